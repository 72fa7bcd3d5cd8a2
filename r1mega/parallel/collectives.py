"""Collectives over plain Python objects and metric sums, over the control group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def share(value: Any, group: dist.ProcessGroup, source: int = 0) -> Any:
    """The object of rank `source`, on every rank."""
    if dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    boxes: list[Any] = [None] * size
    dist.all_gather_object(boxes, value, group=group)
    return boxes


def reduce_dict(
    values: dict[str, float], group: dist.ProcessGroup, op: dist.ReduceOp = dist.ReduceOp.SUM
) -> dict[str, float]:
    """Reduce numbers by name over the group, in fp64. Every rank must hold the same names."""
    if dist.get_world_size(group) == 1:
        return dict(values)
    names = sorted(values)
    tensor = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(tensor, op=op, group=group)
    return dict(zip(names, tensor.tolist(), strict=True))
