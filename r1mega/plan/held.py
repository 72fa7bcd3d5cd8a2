"""What every rank of a layout holds of a model: from Megatron itself in an imagined world, or from the family's table.

All ranks of a pipeline stage hold tensors of the same shapes: heads, widths, experts and the padded vocabulary are cut
into equal parts. So a stage is one distinct coordinate, and its first rank speaks for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Placement, Slot, Vocabulary
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout


@dataclass(frozen=True)
class Held:
    """Numbers of elements on one rank of a pipeline stage.

    `dense` parameters are copies on the tp x cp x dp ranks that do not cut them, `experts` on the expert-data-parallel
    ones; `frozen` ones take no gradient. `gate_biases` are fp32 buffers. `distinct` counts the tensors of the whole
    stage, over all of its ranks, each once: parameters and gate biases.
    """

    stage: int
    dense: int
    experts: int
    frozen: int
    gate_biases: int
    tensors: int
    distinct: int

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.dense + self.experts

    @property
    def parameters(self) -> int:
        """All parameters of the rank."""
        return self.trained + self.frozen


def from_megatron(
    fields: HfFields,
    layout: Layout,
    *,
    freezes_mtp: bool,
    on_stage: Callable[[int], None] = lambda _stage: None,
    stages: Iterable[int] | None = None,
) -> list[Held]:
    """Builds the model of the first rank of every stage in an imagined world, one after the other, and counts.

    Copies along the data-parallel axis hold the same shapes, so the world has no more of them than the experts ask for.
    No memory is touched: weights are allocated and never written.

    Args:
        on_stage: called with each stage before it is built.
        stages: those that are built; all of them where nothing is said.
    """
    world = smallest_world(layout)
    placement, slots = placement_of(fields, world), slots_of(fields)
    by_stage: dict[int, list[Slot]] = {}
    for slot in slots:
        by_stage.setdefault(placement.stage(slot), []).append(slot)
    found = []
    for stage in range(layout.pp) if stages is None else stages:
        on_stage(stage)
        named = _named(placement, by_stage.get(stage, []), stage * world.per_stage)
        found.append(_count(fields, world, stage, named, freezes_mtp))
    return found


def smallest_world(layout: Layout) -> Layout:
    """The same cuts with as few data-parallel copies as they allow: tp x cp x dp is a multiple of etp x ep."""
    need = layout.etp * layout.ep
    return replace(layout, dp=need // math.gcd(need, layout.tp * layout.cp))


def _named(placement: Placement, slots: list[Slot], rank: int) -> dict[tuple[int, str], Slot]:
    """(model chunk, name in it) -> slot, of what a rank holds; the table itself goes before its copy."""
    found: dict[tuple[int, str], Slot] = {}
    for slot in slots:
        if placement.shard_on(slot, rank) is None:
            continue
        key = placement.model_index(slot), placement.local_name(slot)
        if key not in found or found[key].is_copy:
            found[key] = slot
    return found


def _count(fields: HfFields, world: Layout, stage: int, named: dict[tuple[int, str], Slot], freezes_mtp: bool) -> Held:
    import torch

    from r1mega.parallel import groups

    imagined = groups.imagine(world, stage * world.per_stage)
    try:
        from r1mega.models.build import build_chunks
        from r1mega.models.hf_config import ModelOptions

        options = ModelOptions(params_dtype=torch.bfloat16, freezes_mtp=freezes_mtp)
        with _unfilled():
            chunks = build_chunks(fields, imagined, options)
        counts: Counter[str] = Counter()
        for index, chunk in enumerate(chunks):
            for name, tensor in _tensors(chunk):
                slot = named[index, name]
                size = tensor.numel()
                kind = _kind(tensor)
                counts[kind] += size
                counts["tensors"] += 1
                if not slot.is_copy:
                    counts["distinct"] += _distinct(slot, size, world)
    finally:
        groups.shutdown()
    return Held(stage, *(counts[name] for name in ("dense", "experts", "frozen", "gate_biases", "tensors", "distinct")))


def _kind(tensor: Any) -> str:
    import torch

    if not isinstance(tensor, torch.nn.Parameter):
        return "gate_biases"
    if not tensor.requires_grad:
        return "frozen"
    return "dense" if getattr(tensor, "allreduce", True) else "experts"


def _tensors(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Parameters, and the buffers that belong to the checkpoint."""
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(".expert_bias"))


def _distinct(slot: Slot, size: int, layout: Layout) -> int:
    """Elements of the whole tensor, or of all experts' of that kind on this stage, one rank of which holds `size`."""
    shards = {"tp": layout.tp, "etp": layout.etp, None: 1}[slot.axis]
    whole = size * shards * (layout.ep if slot.expert is not None else 1)
    return whole - _padding(slot, shards)


def _padding(slot: Slot, shards: int) -> int:
    """Elements of the rows that round a table of the vocabulary up."""
    if not isinstance(slot.op, Vocabulary):
        return 0
    rows, width = slot.tensors[0].shape
    return (-rows % shards) * width


@contextmanager
def _unfilled() -> Iterator[None]:
    """Nobody reads what the numbers are: Megatron shall not write them into memory."""
    import torch

    places = ((torch.nn.init, "normal_"), (torch.Tensor, "fill_"))
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, lambda tensor, *_args, **_kwargs: tensor)
    try:
        yield
    finally:
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, function)


@dataclass(frozen=True)
class _Alike:
    """What slots have in common that are cut, placed and trained in the same way."""

    chunk: str | int  # "first", "last", or the decoder layer
    axis: str | None
    is_expert: bool
    is_copy: bool
    is_mtp: bool
    is_buffer: bool
    rows: int  # of a table of the vocabulary; 0 for anything else


class Table:
    """The family's table in as few sums as a layout tells apart: what a search over layouts asks instead of Megatron.

    That both say the same is tested.
    """

    def __init__(self, fields: HfFields) -> None:
        self._num_layers = fields["num_hidden_layers"]
        self._num_experts = fields["n_routed_experts"] if fields.is_moe else 1
        self._sums: dict[_Alike, list[int]] = {}  # elements, tensors
        for slot in slots_of(fields):
            alike = _Alike(
                chunk=slot.layer if slot.place == "layer" and slot.layer is not None else slot.place,
                axis=slot.axis,
                is_expert=slot.expert is not None,
                is_copy=slot.is_copy,
                is_mtp=slot.name.startswith("mtp."),
                is_buffer=slot.fp32,
                rows=slot.tensors[0].shape[0] if isinstance(slot.op, Vocabulary) else 0,
            )
            sums = self._sums.setdefault(alike, [0, 0])
            sums[0] += sum(math.prod(tensor.shape) for tensor in slot.tensors)
            sums[1] += 1

    def held(self, layout: Layout, *, freezes_mtp: bool) -> list[Held]:
        """What one rank of each stage holds."""
        found = [Counter[str]() for _ in range(layout.pp)]
        for alike, (elements, tensors) in self._sums.items():
            if alike.is_copy and layout.pp == 1:
                continue  # the stage holds the table itself
            counts = found[self._stage(alike, layout)]
            ep = layout.ep if alike.is_expert else 1
            shards = {"tp": layout.tp, "etp": layout.etp, None: 1}[alike.axis]
            size = elements // ep
            if alike.rows:  # rounded up to what tp divides
                size = size // alike.rows * -(-alike.rows // shards) * shards
            kind = "experts" if alike.is_expert else "dense"
            if alike.is_buffer:
                kind = "gate_biases"
            elif alike.is_mtp and freezes_mtp:
                kind = "frozen"
            counts[kind] += size // shards
            counts["tensors"] += tensors // ep
            counts["distinct"] += 0 if alike.is_copy else elements
        names = ("dense", "experts", "frozen", "gate_biases", "tensors", "distinct")
        return [Held(stage, *(counts[name] for name in names)) for stage, counts in enumerate(found)]

    def _stage(self, alike: _Alike, layout: Layout) -> int:
        if alike.chunk == "first":
            return 0
        if alike.chunk == "last":
            return layout.pp - 1
        return layout.layer_place(int(alike.chunk), self._num_layers)[0] % layout.pp


_TABLES: dict[str, Table] = {}


def table_of(fields: HfFields) -> Table:
    """The table of a model, made once in a process: DeepSeek-V3's has 31,016 rows."""
    key = json.dumps([fields.values, fields.num_mtp_layers, fields.has_score], sort_keys=True)
    if key not in _TABLES:
        _TABLES[key] = Table(fields)
    return _TABLES[key]
