"""Collectives over plain Python objects and metric sums, over the control group; and one over what ranks computed."""

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


class _SumOnce(torch.autograd.Function):
    """Sum over a group of ranks that all go on with the same computation: each one's gradient is its own part's."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def sum_once(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the group, of which each rank's gradient reaches its own part once."""
    return _SumOnce.apply(values, group) if group.size() > 1 else values


def spread_over(part_L: torch.Tensor, select_L: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All `size` values on every rank of the group, of which this rank has worked out those at `select_L`.

    Differentiable, where every rank then computes the same loss from the result: its gradient reaches each part once.
    """
    return _SumOnce.apply(part_L.new_zeros(size).index_copy(0, select_L, part_L), group)
