"""mbridge's loader of Hugging Face checkpoints as the other system: one process, CPU, gloo, no Transformer Engine.

`python -m benchmarks.mbridge_peer HF_DIR` builds a deepseek_v3 model of Megatron-Core whose parameters have the names
and the modules of Transformer Engine's spec, which mbridge expects, lets mbridge's own `load_weights` fill it, and
prints one JSON line:

    seconds            wall time of `load_weights` alone; importing, building and checking are outside it
    vm_hwm_bytes       largest resident size so far by /proc/self/status, pages of mapped checkpoint files among them;
                       getrusage would count the process that started this one in
    rss_before_bytes   resident size just before `load_weights`: interpreter, libraries and unfilled parameters
    tensors            Hugging Face tensors that were loaded
    peer               "mbridge X.Y"

`--save DIR` also times mbridge's `save_weights` (`save_seconds`), and `--verify` then reads what was written and
compares every value with its source for equality (`verified`). Both come after the figures above are taken.

It needs mbridge 0.15 and einops, which r1mega does not: into an environment of its own with r1mega in it,
`pip install mbridge==0.15.1 --no-deps` and `pip install einops`.

What is mbridge's and what is not. `load_weights`, `save_weights`, the names, the merging of gate and up projections,
the reading and writing of safetensors and the scatter over the tensor ranks are mbridge's, unchanged. Two methods of
its DeepSeek-V3 bridge cannot run here and are replaced:

- `_build_config` fails with megatron-core 0.16 (`max_position_embeddings` is no argument of MLATransformerConfig) and
  with transformers 5 (`rope_theta` is no field of the configuration). The configuration of the model given here
  answers instead; a load in one process reads nothing from it.
- `_get_safetensor_io` gives a reader that imports triton and opens files on CUDA, in order to dequantize FP8. For BF16
  it does what mbridge's reader for all other families does, which is given instead.

r1mega lends the bridge of Megatron-Core to the CPU, the process groups, the validation of config.json, the
TransformerConfig and the torch layer spec. None of its conversion of weights runs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")  # of Apex and Transformer Engine, which are not there

from benchmarks.measured_command import high_water_bytes
from r1mega.parallel import device, groups
from r1mega.parallel.layout import Layout

device.prepare("cpu")  # before the first import of Megatron

import torch
from mbridge.core.safetensor_io import SafeTensorIO
from mbridge.models import DeepseekV3Bridge
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig

from r1mega.models import hf_fields
from r1mega.models.hf_config import ModelOptions, padded_vocab_size, transformer_config
from r1mega.models.layer_spec import decoder_spec


class NormedLinear(ColumnParallelLinear):
    """Parameters of TELayerNormColumnParallelLinear: a linear layer that holds the weight of the norm before it."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(input_size, output_size, config=config, **arguments)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))


class GroupedLinear(torch.nn.Module):
    """Parameters of TEGroupedLinear: `weight0`, `weight1` ... [out, in], one for each expert of this rank."""

    def __init__(
        self, num_experts: int, input_size: int, output_size: int, *, config: TransformerConfig, **_unused: Any
    ) -> None:
        super().__init__()
        for expert in range(num_experts):
            weight = torch.empty(output_size, input_size, dtype=config.params_dtype)
            self.register_parameter(f"weight{expert}", torch.nn.Parameter(weight))


class CpuBridge(DeepseekV3Bridge):
    """mbridge's bridge of DeepSeek-V3 for a model that is already built, without CUDA."""

    def __init__(self, hf_config: Any, megatron_config: TransformerConfig) -> None:
        self._megatron_config = megatron_config
        super().__init__(hf_config, dtype=megatron_config.params_dtype)

    def _build_config(self) -> TransformerConfig:
        return self._megatron_config

    def _get_safetensor_io(self, weights_path: str) -> SafeTensorIO:
        return SafeTensorIO(self._get_actual_hf_path(weights_path))


def join_world_of_one(threads: int) -> groups.Groups:
    """Start gloo with this process alone, and Megatron's groups in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return groups.initialize(Layout(), "cpu", seed=0, timeout_minutes=30, threads=threads)


def build_model(checkpoint: Path, world: groups.Groups) -> GPTModel:
    """The model with unfilled BF16 parameters, without multi-token prediction (mbridge has that at 61 layers only)."""
    fields = hf_fields.read(checkpoint, drop_mtp=True)
    if fields.family != "deepseek_v3":
        raise ValueError(f"{checkpoint}: model_type: got {fields.family}; must be deepseek_v3")
    config = transformer_config(fields, world.layout, ModelOptions(params_dtype=torch.bfloat16))
    return GPTModel(
        config=config,
        transformer_layer_spec=_named_as_transformer_engine(decoder_spec(config, "torch")),
        vocab_size=padded_vocab_size(fields, world.layout),
        max_sequence_length=fields["max_position_embeddings"],
        share_embeddings_and_output_weights=fields["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=fields.rope["rope_theta"],
        pg_collection=world.collection,
    )


def _named_as_transformer_engine(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The spec with norms inside the up-projections and with one module for all experts, as with the `te` spec.

    The one module matters to the time as well: mbridge asks for the state_dict of the whole model once a parameter.
    """
    for layer in block.layer_specs:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        attention.linear_q_up_proj = attention.linear_kv_up_proj = NormedLinear
        attention.q_layernorm = attention.kv_layernorm = IdentityOp
        if hasattr(mlp, "experts"):
            linears = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
            mlp.experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    return block


def loaded_names(bridge: CpuBridge, model: GPTModel) -> set[str]:
    """The Hugging Face tensors that mbridge reads for this model."""
    megatron_names = bridge._weight_name_mapping_mcore_local_to_global(model).values()
    return {name for megatron in megatron_names for name in bridge._weight_name_mapping_mcore_to_hf(megatron)}


def check_complete(bridge: CpuBridge, names: set[str]) -> None:
    """Raise ValueError unless every tensor of the checkpoint was loaded, extra prediction layers excepted."""
    layers = bridge.config.num_layers
    held = {name for name in bridge.safetensor_io.load_hf_weight_names() if hf_fields.layer_of(name) < layers}
    if held != names:
        raise ValueError(f"not loaded: {sorted(held - names)[:3]}; not in the checkpoint: {sorted(names - held)[:3]}")


def count_equal(names: set[str], source: Path, copy: Path) -> int:
    """How many tensors are equal in the two checkpoints. Raises ValueError at the first that differs."""
    ours, theirs = SafeTensorIO(str(source)), SafeTensorIO(str(copy))
    for name in sorted(names):
        first, second = ours.load_one_hf_weight(name), theirs.load_one_hf_weight(name)
        # In fp32, which both fit: the bias of the gate is held in it, whatever the checkpoint has.
        if not torch.equal(first.float(), second.float()):
            raise ValueError(f"{name}: {copy} differs from {source}")
    return len(names)


def resident_bytes() -> int:
    """The resident size of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Load the checkpoint that the command line names; print the figures as one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mbridge_peer", description="Time mbridge's loader on one checkpoint, on CPU."
    )
    parser.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="a deepseek_v3 checkpoint in BF16")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of torch")
    parser.add_argument("--memory-efficient", action="store_true", help="mbridge's option: read tensors one by one")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the model with mbridge, and time it")
    parser.add_argument("--verify", action="store_true", help="compare what was written with the source")
    arguments = parser.parse_args()
    if arguments.verify and not arguments.save:
        parser.error("--verify needs --save")

    world = join_world_of_one(arguments.threads)
    try:
        model = build_model(arguments.checkpoint, world)
        bridge = CpuBridge(AutoConfig.from_pretrained(arguments.checkpoint), model.config)
        before = resident_bytes()
        begin = time.perf_counter()
        bridge.load_weights([model], str(arguments.checkpoint), memory_efficient=arguments.memory_efficient)
        seconds = time.perf_counter() - begin
        report: dict[str, Any] = {"seconds": seconds, "vm_hwm_bytes": high_water_bytes(), "rss_before_bytes": before}
        names = loaded_names(bridge, model)
        check_complete(bridge, names)
        report |= {"tensors": len(names), "peer": f"mbridge {version('mbridge')}"}
        if arguments.save:
            begin = time.perf_counter()
            bridge.save_weights([model], str(arguments.save), memory_efficient=arguments.memory_efficient)
            report["save_seconds"] = time.perf_counter() - begin
        if arguments.verify:
            report["verified"] = count_equal(names, arguments.checkpoint, arguments.save)
    finally:
        groups.shutdown()
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
