"""Plain-torch reference of DeepSeek-V3's multi-token prediction (MTP), depth 1.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2, and the tensors of the published checkpoint. With
t_0 .. t_{T-1} the tokens, h_i the main model's output after its final norm, and i counted from 0:

    h'_i     = M [RMSNorm_e(Emb(t_{i+1})) ; RMSNorm_h(h_i)]     i = 0 .. T-2    `enorm`, `hnorm`, `eh_proj`
    h''      = Block(h'_0 .. h'_{T-2})                          causal          the decoder layer's own names
    P(t_{i+2}) = softmax(Head(RMSNorm_s(h''_i)))                i = 0 .. T-3    `shared_head.norm`, `lm_head`

The report writes the hidden state first in the concatenation; the published `eh_proj` has the embedding first, and that
order is taken here. Embedding and head are the main model's, and nothing is detached. The MTP layer of a model of L
layers is `model.layers.L.*`; its `embed_tokens.weight` and `shared_head.head.weight` repeat the main model's tensors.

The main model and the decoder block are transformers' own classes; everything around the block is spelled out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MTP_SHARD = "model-mtp.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_STD = 0.05
_NORM_STD = 0.1
_GATE_BIAS = "e_score_correction_bias"
_GATE_BIAS_STD = 0.01
_GATE_UP = "mlp.experts.gate_up_proj"
_DOWN = "mlp.experts.down_proj"


def add_mtp_tensors(checkpoint_dir: Path, seed: int) -> None:
    """Give the deepseek_v3 checkpoint in `checkpoint_dir` one MTP layer of random weights, in place.

    Adds `model.layers.L.*` (L = num_hidden_layers): shapes and dtypes are those of the last main layer, which has to be
    a MoE layer; the gate's bias is fp32, as published. Weights are normal(0, 0.05), norms 1 + normal(0, 0.1), the
    gate's bias normal(0, 0.01). The two repeated tensors are exact copies. config.json gets
    `num_nextn_predict_layers: 1`. A single file is written anew; beside an index the layer gets a file of its own.

    Raises:
        ValueError: the last main layer is dense, or the checkpoint has an MTP layer already.
    """
    checkpoint_dir = Path(checkpoint_dir)
    config = json.loads((checkpoint_dir / "config.json").read_text())
    where = _weight_map(checkpoint_dir)
    layer = config["num_hidden_layers"]
    if any(name.startswith(f"model.layers.{layer}.") for name in where):
        raise ValueError(f"{checkpoint_dir}: model.layers.{layer}.* is there already")
    added = _random_layer(checkpoint_dir, where, layer, torch.Generator().manual_seed(seed))
    if (checkpoint_dir / INDEX).exists():
        save_file(added, checkpoint_dir / MTP_SHARD, metadata={"format": "pt"})
        index = json.loads((checkpoint_dir / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(added, MTP_SHARD)
        metadata = index.setdefault("metadata", {})
        if "total_size" in metadata:
            metadata["total_size"] += sum(tensor.nbytes for tensor in added.values())
        if "total_parameters" in metadata:
            metadata["total_parameters"] += sum(tensor.numel() for tensor in added.values())
        (checkpoint_dir / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    else:
        kept = {name: tensor.clone() for name, tensor in _read(checkpoint_dir, where, where).items()}
        save_file({**kept, **added}, checkpoint_dir / SINGLE, metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = 1
    if "num_mtp_layers" in config:
        config["num_mtp_layers"] = 1
    (checkpoint_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class MtpReference:
    """Main model and MTP layer of a checkpoint in fp32 on the CPU, differentiable in every weight.

    Attributes:
        model: transformers' DeepseekV3ForCausalLM, eager attention and eager experts.
        block: the MTP layer's transformer block, transformers' DeepseekV3DecoderLayer.
        enorm, hnorm, shared_norm: RMSNorm weights [hidden].
        eh_proj: the projection M [hidden, 2 * hidden]; columns [:hidden] take the embedding.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        """Raises ValueError where tensors are missing, left over, or the repeated ones differ from the main model's."""
        checkpoint_dir = Path(checkpoint_dir)
        self.model, info = DeepseekV3ForCausalLM.from_pretrained(
            checkpoint_dir,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"{checkpoint_dir}: main model: {info['missing_keys']}, {info['mismatched_keys']}")
        self.model.eval()
        self.model.get_input_embeddings().padding_idx = None  # the padding token's row has a gradient like any other
        self.layer = self.model.config.num_hidden_layers
        self._prefix = f"model.layers.{self.layer}."
        where = _weight_map(checkpoint_dir)
        names = [name for name in where if name.startswith(self._prefix)]
        stored = {name: tensor.float() for name, tensor in _read(checkpoint_dir, where, names).items()}
        self._check_repeated(stored)
        self.enorm = self._parameter(stored, "enorm.weight")
        self.hnorm = self._parameter(stored, "hnorm.weight")
        self.eh_proj = self._parameter(stored, "eh_proj.weight")
        self.shared_norm = self._parameter(stored, "shared_head.norm.weight")
        self.block = DeepseekV3DecoderLayer(self.model.config, self.layer).float().eval()
        self._load_block(stored)

    def distribution(self, tokens: list[int]) -> torch.Tensor:
        """MTP log-probabilities of the whole vocabulary, [len(tokens) - 2, vocab]; row i is about token i + 2."""
        if len(tokens) < 3:
            raise ValueError(f"{len(tokens)} tokens; MTP needs 3 for one prediction")
        ids = torch.tensor(tokens)
        hidden = self.model.model(input_ids=ids[None]).last_hidden_state[0]  # [T, hidden], after model.norm
        embedded = self.model.model.embed_tokens.weight[ids]  # [T, hidden]
        joined = torch.cat([self._norm(embedded[1:], self.enorm), self._norm(hidden[:-1], self.hnorm)], dim=-1)
        states = self._run_block(joined @ self.eh_proj.T)  # [T - 1, hidden]
        # The last position, T - 2, predicts a token after the end: it is left out after the block, which is causal.
        logits = self._norm(states[:-1], self.shared_norm) @ self.model.lm_head.weight.T
        return torch.log_softmax(logits, dim=-1)

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """MTP log-probability of token i + 2 at position i, [len(tokens) - 2]."""
        targets = torch.tensor(tokens[2:])
        return self.distribution(tokens).gather(1, targets[:, None])[:, 0]

    def main_logprobs(self, tokens: list[int]) -> torch.Tensor:
        """The main model's log-probability of token i + 1 at position i, [len(tokens) - 1]."""
        ids = torch.tensor(tokens)
        logits = self.model(input_ids=ids[None]).logits[0, :-1]
        return torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]

    def weights(self) -> dict[str, torch.Tensor]:
        """Every trained weight by its checkpoint name; the tensors alias the parameters and carry no gradient.

        The repeated embedding and head are not listed, nor are the gates' biases, which no gradient reaches.
        """
        return {name: parameter.detach()[place] for name, parameter, place in self._places()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients summed over all `backward` calls since `zero_gradients`, under the names of `weights`.

        Zeros where no gradient has reached a weight. The tensors alias the gradients: clone them to keep them.
        """
        return {
            name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)[place]
            for name, parameter, place in self._places()
        }

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return [parameter for _, parameter in self._parameters()]

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules, by their names in the checkpoint."""
        yield from self.model.named_modules()
        yield from ((self._prefix + name, module) for name, module in self.block.named_modules() if name)

    def is_mtp(self, name: str) -> bool:
        """Whether a module's name is of the MTP layer."""
        return name.startswith(self._prefix)

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        for _, parameter in self._parameters():
            parameter.grad = None

    def _run_block(self, states: torch.Tensor) -> torch.Tensor:
        """The decoder block over [S, hidden] as one causal sequence. Eager attention has no mask of its own."""
        length = len(states)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        positions = torch.arange(length)[None]  # the attention sees differences of positions only
        rope = self.model.model.rotary_emb(states, positions)
        return self.block(states[None], attention_mask=mask, position_ids=positions, position_embeddings=rope)[0]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps) * weight

    def _parameter(self, stored: dict[str, torch.Tensor], name: str) -> torch.nn.Parameter:
        """Take a tensor of the MTP layer out of `stored`."""
        if self._prefix + name not in stored:
            raise ValueError(f"tensor {self._prefix}{name} is missing")
        return torch.nn.Parameter(stored.pop(self._prefix + name).clone())

    def _check_repeated(self, stored: dict[str, torch.Tensor]) -> None:
        """Take the embedding and the head out of `stored`; they have to be the main model's."""
        main = {"embed_tokens.weight": self.model.model.embed_tokens, "shared_head.head.weight": self.model.lm_head}
        for name, module in main.items():
            if not torch.equal(self._parameter(stored, name), module.weight):
                raise ValueError(f"tensor {self._prefix}{name} is not the main model's")

    @torch.no_grad()
    def _load_block(self, stored: dict[str, torch.Tensor]) -> None:
        """Fill the block's parameters and buffers; what is then left of `stored` is an error."""
        for name, tensor in self.block.state_dict().items():
            for checkpoint_name, place in split_experts(self._prefix + name, tensor):
                view = tensor[place]
                value = self._parameter(stored, checkpoint_name.removeprefix(self._prefix))
                if value.shape != view.shape:
                    raise ValueError(f"tensor {checkpoint_name}: {list(value.shape)}; must be {list(view.shape)}")
                view.copy_(value)
        if stored:
            raise ValueError(f"tensors without a place in the MTP layer: {sorted(stored)}")

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters under the names of transformers' state dict; tied weights once."""
        yield from self.model.named_parameters()
        yield self._prefix + "enorm.weight", self.enorm
        yield self._prefix + "hnorm.weight", self.hnorm
        yield self._prefix + "eh_proj.weight", self.eh_proj
        yield from ((self._prefix + name, parameter) for name, parameter in self.block.named_parameters())
        yield self._prefix + "shared_head.norm.weight", self.shared_norm

    def _places(self) -> Iterator[tuple[str, torch.nn.Parameter, tuple]]:
        """(checkpoint name, parameter, index of its part of the parameter)."""
        for name, parameter in self._parameters():
            for checkpoint_name, place in split_experts(name, parameter):
                yield checkpoint_name, parameter, place


def split_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, tuple]]:
    """Checkpoint names of one tensor of transformers' state dict, each with the index of its part.

    transformers 5 keeps the experts of a layer as `gate_up_proj` [experts, 2 * ffn, hidden], the gate's rows first, and
    `down_proj` [experts, hidden, ffn].
    """
    if name.endswith(_GATE_UP):
        stem, ffn = name.removesuffix("gate_up_proj"), tensor.shape[1] // 2
        for expert in range(tensor.shape[0]):
            yield f"{stem}{expert}.gate_proj.weight", (expert, slice(None, ffn))
            yield f"{stem}{expert}.up_proj.weight", (expert, slice(ffn, None))
    elif name.endswith(_DOWN):
        stem = name.removesuffix("down_proj")
        for expert in range(tensor.shape[0]):
            yield f"{stem}{expert}.down_proj.weight", (expert,)
    else:
        yield name, (...,)


def _random_layer(
    checkpoint_dir: Path, where: dict[str, str], layer: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of the MTP layer `model.layers.{layer}` by name, made in the order of their names."""
    last = f"model.layers.{layer - 1}."
    names = [name for name in where if name.startswith(last)]
    if last + "mlp.gate.weight" not in names:
        raise ValueError(f"{checkpoint_dir}: layer {layer - 1} is dense; the MTP layer takes its shapes from a MoE one")
    main = _read(checkpoint_dir, where, [EMBEDDING, HEAD if HEAD in where else EMBEDDING, "model.norm.weight"])
    embedding, head, norm = main[EMBEDDING], main.get(HEAD, main[EMBEDDING]), main["model.norm.weight"]
    templates = {name.removeprefix(last): tensor for name, tensor in _read(checkpoint_dir, where, names).items()}
    templates |= {"enorm.weight": norm, "hnorm.weight": norm, "shared_head.norm.weight": norm}
    templates["eh_proj.weight"] = embedding.new_empty(norm.numel(), 2 * norm.numel())
    made = {}
    for name, template in sorted(templates.items()):
        noise = torch.randn(template.shape, generator=generator)
        if name.endswith(_GATE_BIAS):
            made[name] = _GATE_BIAS_STD * noise
        elif "norm" in name:
            made[name] = (1 + _NORM_STD * noise).to(template.dtype)
        else:
            made[name] = (_STD * noise).to(template.dtype)
    made |= {"embed_tokens.weight": embedding.clone(), "shared_head.head.weight": head.clone()}
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in made.items()}


def _weight_map(checkpoint_dir: Path) -> dict[str, str]:
    """Tensor name -> file name of a checkpoint, sharded or single."""
    if (checkpoint_dir / INDEX).exists():
        return json.loads((checkpoint_dir / INDEX).read_text())["weight_map"]
    with safe_open(checkpoint_dir / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _read(checkpoint_dir: Path, where: dict[str, str], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors `names`, each in its stored dtype."""
    by_file: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        by_file.setdefault(where[name], []).append(name)
    found = {}
    for file_name, members in by_file.items():
        with safe_open(checkpoint_dir / file_name, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in members}
    return found
