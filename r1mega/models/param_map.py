"""How a Megatron parameter is made of Hugging Face tensors, and back: the operations and the slots of a table.

A family's table (`models/tables/`) declares each parameter once. An operation knows both directions and the cut:
`to_megatron` makes one shard of the Megatron tensor, `to_hf` undoes it from all shards in order. Both accept meta
tensors, so shapes of every shard of any layout can be asked for without memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F

from r1mega.parallel.layout import Layout


class Op(Protocol):
    """One way Hugging Face tensors and the shards of a Megatron tensor correspond.

    `stored_apart` says how Megatron's checkpoints store the whole tensor: as one box, or as one box of rows for each
    Hugging Face tensor, in their order, each as it is.
    """

    stored_apart: ClassVar[bool]

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        """Shard `index` of `size`."""

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The Hugging Face tensors of all shards, in the order of the table."""


@dataclass(frozen=True)
class Whole:
    """The same tensor on every rank."""

    stored_apart: ClassVar[bool] = False

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        return tensors[0]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Cut:
    """One tensor in equal contiguous parts along `dim`: 0 for a column-parallel weight [out, in], 1 for
    row-parallel."""

    stored_apart: ClassVar[bool] = False

    dim: int

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        return tensors[0].chunk(size, dim=self.dim)[index]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards), dim=self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """A table of `vocab_size` rows, zero-padded until the ranks divide it, then cut by rows."""

    stored_apart: ClassVar[bool] = False

    vocab_size: int

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        rows = -(-self.vocab_size // size)
        part = tensors[0][index * rows : (index + 1) * rows]
        return F.pad(part, (0, 0, 0, rows - part.shape[0])) if part.shape[0] < rows else part

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(list(shards))[: self.vocab_size]]


@dataclass(frozen=True)
class GateUp:
    """gate [ffn, in] and up [ffn, in] -> fc1: on each rank its part of the gate above its part of up."""

    stored_apart: ClassVar[bool] = True

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        gate, up = tensors
        return torch.cat([gate.chunk(size)[index], up.chunk(size)[index]])

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])]


@dataclass(frozen=True)
class QKV:
    """q, k, v (weights [heads * head_dim, in] or biases [heads * head_dim]) -> one tensor, query group by query group.

    Each group holds its query heads, then its key head, then its value head; ranks take whole groups.
    """

    stored_apart: ClassVar[bool] = False

    num_heads: int
    num_groups: int
    head_dim: int

    def to_megatron(self, tensors: Sequence[torch.Tensor], index: int, size: int) -> torch.Tensor:
        grouped = [tensor.unflatten(0, (self.num_groups, -1)).chunk(size)[index] for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def to_hf(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        whole = torch.cat(list(shards)).unflatten(0, (self.num_groups, -1))
        queries = self.num_heads // self.num_groups * self.head_dim
        parts = whole.split([queries, self.head_dim, self.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint: its name and shape.

    `kind` says how it is initialised from nothing; `fp8`, whether a checkpoint in FP8 holds it in FP8 blocks (the
    weights of linear layers, but not the router's, the embedding's and the output's: V3 section 3.3).
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"  # "weight" normal(0, initializer_range), "norm" ones, "zero" zeros
    fp8: bool = False


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter of the whole model and the tensors it is made of.

    Args:
        name: Megatron's name with layer and expert numbers counted over the whole model.
        tensors: its Hugging Face tensors, in the order `op` takes them.
        axis: the axis it is cut on: "tp", "etp" (experts), or None for the same on every rank.
        layer: decoder layer, or None for what stands before ("first") or after ("last") the layers: see `place`.
        expert: routed expert, or None.
        place: "layer", "first" or "last".
        fp32: kept in fp32 whatever the parameters' dtype is.
        is_copy: filled from the checkpoint but never exported: a table of the first stage that the last one needs too.
        aliases: tensors of the checkpoint that repeat `tensors[0]` under other names; exported again, and compared with
            it when they are read.
    """

    name: str
    tensors: tuple[HfTensor, ...]
    op: Op
    axis: str | None = "tp"
    layer: int | None = None
    expert: int | None = None
    place: str = "layer"
    fp32: bool = False
    is_copy: bool = False
    aliases: tuple[HfTensor, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where the slots of a model with these numbers stand in a layout."""

    layout: Layout
    num_layers: int
    num_experts: int = 0
    num_dense_layers: int = 0  # the first layers, which have no experts
    has_mla: bool = False

    def chunk(self, slot: Slot) -> int:
        """The chunk of layers, counted over the whole pipeline, that holds the slot."""
        if slot.place == "first":
            return 0
        if slot.place == "last":
            return self.layout.num_chunks - 1
        assert slot.layer is not None
        return self.layout.layer_place(slot.layer, self.num_layers)[0]

    def stage(self, slot: Slot) -> int:
        """The pipeline stage that holds the slot."""
        return self.chunk(slot) % self.layout.pp

    def model_index(self, slot: Slot) -> int:
        """Which of its stage's model chunks holds the slot; 0 unless the pipeline is interleaved."""
        return self.chunk(slot) // self.layout.pp

    def num_shards(self, slot: Slot) -> int:
        return {"tp": self.layout.tp, "etp": self.layout.etp, None: 1}[slot.axis]

    def owner(self, slot: Slot, shard: int) -> int:
        """The first global rank that holds this shard of the slot (context and data parallel copies come after it)."""
        base = self.stage(slot) * self.layout.per_stage
        if slot.expert is None:
            return base + shard
        ep = slot.expert // (self.num_experts // self.layout.ep)
        return base + ep * self.layout.etp + shard

    def shard_on(self, slot: Slot, rank: int) -> int | None:
        """Which shard of the slot `rank` holds; None where it holds none."""
        at = self.layout.coordinate(rank)
        if at.pp != self.stage(slot):
            return None
        if slot.expert is not None and at.ep != slot.expert // (self.num_experts // self.layout.ep):
            return None
        return {"tp": at.tp, "etp": at.etp, None: 0}[slot.axis]

    def local_name(self, slot: Slot, layer_spec: str = "torch") -> str:
        """The name of the slot inside the module of the rank that holds it."""
        name = slot.name
        if slot.layer is not None:
            local = self.layout.layer_place(slot.layer, self.num_layers)[1]
            name = name.replace(f"layers.{slot.layer}.", f"layers.{local}.", 1)
        if slot.expert is not None:
            local = slot.expert % (self.num_experts // self.layout.ep)
            name = name.replace(f"local_experts.{slot.expert}.", f"local_experts.{local}.", 1)
        if layer_spec == "te":
            return te_renamed(name, has_mla=self.has_mla, is_moe_layer=self.is_moe_layer(slot))
        return name

    def is_moe_layer(self, slot: Slot) -> bool:
        """Whether the slot's layer is one of experts, as the multi-token-prediction layer after the last is."""
        layer = self.num_layers if slot.layer is None else slot.layer
        return self.num_experts > 0 and layer >= self.num_dense_layers


# Transformer Engine fuses a norm into the linear that follows it, and the experts into one module.
_TE_NAMES = (
    (".self_attention.q_layernorm.weight", ".self_attention.linear_q_up_proj.layer_norm_weight"),
    (".self_attention.kv_layernorm.weight", ".self_attention.linear_kv_up_proj.layer_norm_weight"),
)


def te_renamed(name: str, *, has_mla: bool, is_moe_layer: bool) -> str:
    """The Transformer Engine name of a parameter of the torch spec.

    With MLA the input norm stands alone; without, it is fused into linear_qkv. A dense MLP's norm is fused into
    linear_fc1; a MoE layer's stands alone.
    """
    for ours, theirs in _TE_NAMES:
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    if not has_mla and name.endswith(".input_layernorm.weight"):
        return name.removesuffix("input_layernorm.weight") + "self_attention.linear_qkv.layer_norm_weight"
    if not is_moe_layer and name.endswith(".pre_mlp_layernorm.weight"):
        return name.removesuffix("pre_mlp_layernorm.weight") + "mlp.linear_fc1.layer_norm_weight"
    if ".local_experts." in name:
        head, _, tail = name.partition("local_experts.")
        expert, linear, _ = tail.split(".")
        return f"{head}{linear}.weight{expert}"
    return name
