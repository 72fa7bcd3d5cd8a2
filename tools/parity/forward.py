"""Log-probs of random tokens by a checkpoint in either format, fp32 on the CPU: transformers, or Megatron-Core."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import psutil
import torch

from parity.case import random_case
from r1mega.conversion.hf_source import HfSource
from r1mega.conversion.megatron_source import MegatronSource
from r1mega.conversion.run import open_source
from r1mega.conversion.scratch import Scratch

_COPIES = 2.5  # of the weights in fp32 while a model is filled, with room for what it computes


def logprobs(kind: str, path: Path) -> torch.Tensor:
    """[responses] log-probs of a few random sequences. Raises ValueError where the model does not fit into memory.

    A process that has asked for "megatron" once can no longer be asked for "hf": the device bridge is laid.
    """
    source = open_source(path, kind)
    elements = sum(torch.Size(tensor.shape).numel() for piece in source.pieces for tensor in piece.tensors)
    needed, free = int(_COPIES * 4 * elements), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{path}: {elements:,} parameters need some {needed / 1e9:,.0f} GB in fp32, {free / 1e9:,.0f} GB are free; "
            "run --logits on a larger machine"
        )
    case = random_case(source.fields["vocab_size"], num_sequences=4, max_length=64)
    compute = _transformers if isinstance(source, HfSource) else _megatron
    return compute(source, case.sequences)


def _transformers(source: HfSource, sequences: list[tuple[list[int], int]]) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1mega.rollout.hf_weights import WeightTable

    config = AutoConfig.from_pretrained(source.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights come dequantised
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    scratch, layers = Scratch(), source.fields["num_hidden_layers"]

    def tensors():
        for piece in source.pieces:
            if f"model.layers.{layers}." not in piece.tensors[0].name:  # transformers has no layer two tokens ahead
                plains, _ = source.read(piece, scratch)
                yield from ((tensor.name, plain.value) for tensor, plain in zip(piece.tensors, plains, strict=True))

    WeightTable(model).load(tensors())
    found = []
    with torch.no_grad():
        for tokens, response in sequences:
            every = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            found.append(every.gather(1, torch.tensor(tokens[1:])[:, None])[-response:, 0])
    return torch.cat(found)


def _megatron(source: MegatronSource, sequences: list[tuple[list[int], int]]) -> torch.Tensor:
    from r1mega.parallel import groups
    from r1mega.parallel.layout import Layout

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = groups.initialize(Layout(), "cpu", seed=0, timeout_minutes=5, threads=torch.get_num_threads())
    from r1mega.models.hf_config import ModelOptions
    from r1mega.train.batch import PackItem
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy

    warnings.simplefilter("ignore")  # Megatron's loading speaks of torch's deprecations
    policy = MegatronPolicy(source.fields, world, ModelOptions(params_dtype=torch.float32), AdamSettings(lr=0.0))
    policy.load_distributed(source.path / "model", trains=False)
    items = [PackItem(tokens, response) for tokens, response in sequences]
    found = torch.cat(policy.logprobs(items, policy.plan(items, 256)))
    groups.shutdown()
    return found
