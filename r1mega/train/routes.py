"""Which experts the engine chose, from the rank that collected the samples to the ranks that replay the choice.

A sample of 32,768 tokens says 15 MB at DeepSeek-V3's size, so these numbers travel as tensors, apart from the samples,
and a rank is handed only the layers of its pipeline stage: the collecting rank sends them once to the first rank of
each stage, which tells the others of the stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from r1mega.models.expert_choices import ExpertChoices
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.groups import Groups
from r1mega.parallel.layout import Layout
from r1mega.train.batch import PackItem

_PIECE_BYTES = 64 << 20  # sent at once


def moe_layers(fields: HfFields, layout: Layout, pp_stage: int) -> list[int]:
    """The decoder layers with experts that a pipeline stage holds, in order."""
    total = fields["num_hidden_layers"]
    return [layer for layer in fields.moe_layers if layout.layer_place(layer, total)[0] % layout.pp == pp_stage]


def deal(
    items: Sequence[PackItem],
    choices: Sequence[torch.Tensor | None],
    fields: HfFields,
    groups: Groups,
    *,
    piece_bytes: int = _PIECE_BYTES,
) -> list[PackItem]:
    """The items with the choices of this rank's layers. Collective.

    `choices` [tokens - 1, MoE layers, top_k] of each item are read on rank 0 alone.
    """
    shape = ExpertChoices.of(fields)
    mine: list[torch.Tensor] = []
    for pp_stage in range(groups.layout.pp):
        layers = moe_layers(fields, groups.layout, pp_stage)
        if not layers:
            continue
        columns = [layer - shape.first_moe_layer for layer in layers]
        row_bytes = len(layers) * shape.top_k * shape.dtype.itemsize
        for piece in _pieces([len(item.tokens) - 1 for item in items], max(1, piece_bytes // row_bytes)):
            rows = [len(items[i].tokens) - 1 for i in piece]
            cut = None
            if groups.rank == 0:
                cut = torch.cat([_column_part(choices[i], columns) for i in piece]).contiguous()
            size = (sum(rows), len(layers), shape.top_k)
            got = _tell_stage(cut, size, shape.dtype, groups, pp_stage)
            if got is not None:
                mine += got.split(rows)
    if not mine:
        return list(items)  # no experts on this stage
    return [replace(item, routed_experts=part) for item, part in zip(items, mine, strict=True)]


def _column_part(choices: torch.Tensor | None, columns: list[int]) -> torch.Tensor:
    assert choices is not None, "a sample without the engine's choice of experts"
    return choices[:, columns]


def _pieces(rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbours of at most so many rows together; one alone may have more."""
    piece: list[int] = []
    total = 0
    for i, count in enumerate(rows):
        if piece and total + count > most:
            yield piece
            piece, total = [], 0
        piece.append(i)
        total += count
    if piece:
        yield piece


def _tell_stage(
    cut: torch.Tensor | None, size: tuple[int, ...], dtype: torch.dtype, groups: Groups, pp_stage: int
) -> torch.Tensor | None:
    """Rank 0's tensor on every rank of a stage, None on others. It travels as bytes, which every backend carries."""
    first = pp_stage * groups.layout.per_stage
    if first and groups.rank == 0:
        dist.send(cut.view(torch.uint8), first, group=groups.control)
    if groups.coordinate.pp != pp_stage:
        return None
    tensor = cut if cut is not None else torch.empty(size, dtype=dtype)
    if first and groups.rank == first:
        dist.recv(tensor.view(torch.uint8), 0, group=groups.control)
    if groups.layout.per_stage == 1:
        return tensor
    on_device = tensor.to(groups.device)
    dist.broadcast(on_device.view(torch.uint8), first, group=groups.stage)
    return on_device.cpu()
