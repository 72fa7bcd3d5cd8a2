"""Several ranks on one GPU, which NCCL refuses: what they exchange goes through host memory and gloo.

For tests and trials. Megatron-Core, Transformer Engine and every layout run as they do on a GPU each, at the speed of
the host's memory. `register` names the backend for torch.distributed; its groups take tensors of any device.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "staged"


def register() -> str:
    """Make the backend known to torch.distributed, once; its name."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    return BACKEND


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    return StagedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


class _Done(dist.Work):
    """A collective that was waited for before it was handed out."""

    def wait(self, _timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Transfer(dist.Work):
    """A message under way in host memory; where it is received, `wait` puts it where it belongs.

    It may be waited for again, as Transformer Engine's attention over context-parallel ranks does: gloo would then wait
    for another message.
    """

    def __init__(self, work: dist.Work, on_host: Tensor, destination: Tensor | None = None) -> None:
        super().__init__()
        self._work, self._on_host, self._destination = work, on_host, destination
        self._has_ended = False

    def wait(self, _timeout: Any = None) -> bool:
        if self._has_ended:
            return True
        self._work.wait()
        if self._destination is not None:
            _put(self._destination, self._on_host)
        self._has_ended = True
        return True

    def is_completed(self) -> bool:
        return self._has_ended or self._work.is_completed()


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the host, which waits for the stream that computes the tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _put(tensor: Tensor, found: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(found.view(tensor.shape))


class StagedGroup(dist.ProcessGroup):
    """A process group over gloo whose tensors may lie on a GPU.

    Every collective has ended when it returns, on the host and in the order of the current stream. Of gloo's limits
    those that NCCL lacks are bridged: parts of unequal size in `allgather` and `reduce_scatter`. What training does not
    call (`reduce`, `gather`, `scatter`, lists in `alltoall`) is not there, and torch says so.
    """

    def __init__(self, inner: dist.ProcessGroupGloo, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._inner, self._name = inner, ""

    def _set_group_name(self, name: str) -> None:
        # torch gives names to groups written in C++ alone.
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        for tensor in tensors:
            on_host = _copy(tensor)
            self._inner.allreduce([on_host], opts or dist.AllreduceOptions()).wait()
            _put(tensor, on_host)
        return _Done()

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        one = dist.AllreduceOptions()
        if opts is not None:
            one.reduceOp = opts.reduceOp
        return self.allreduce(tensors, one)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        for tensor in tensors:
            on_host = _copy(tensor)
            self._inner.broadcast([on_host], opts).wait()
            _put(tensor, on_host)
        return _Done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        for parts, tensor in zip(outputs, inputs, strict=True):
            longest = max(part.numel() for part in parts)
            mine = torch.zeros(longest, dtype=tensor.dtype)
            mine[: tensor.numel()] = _copy(tensor).reshape(-1)
            found = [torch.empty_like(mine) for _ in parts]
            self._inner.allgather([found], [mine]).wait()
            for part, flat in zip(parts, found, strict=True):
                _put(part, flat[: part.numel()])
        return _Done()

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        whole = _like(output)
        self._inner._allgather_base(whole, _copy(input)).wait()
        _put(output, whole)
        return _Done()

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self._allgather_base(output, own)
        return _Done()

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        for output, parts in zip(outputs, inputs, strict=True):
            whole = torch.cat([_copy(part).reshape(-1) for part in parts])
            self._sum(whole, opts)
            _put(output, whole.split([part.numel() for part in parts])[self.rank()])
        return _Done()

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        whole = _copy(input).reshape(-1)
        self._sum(whole, opts)
        _put(output, whole.chunk(self.size())[self.rank()])
        return _Done()

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole, opts)
        return _Done()

    def _sum(self, whole: Tensor, opts: Any) -> None:
        reduce = dist.AllreduceOptions()
        reduce.reduceOp = opts.reduceOp
        self._inner.allreduce([whole], reduce).wait()

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        whole = _like(output)
        splits = [[int(size) for size in sizes] for sizes in (output_splits, input_splits)]
        self._inner.alltoall_base(whole, _copy(input), *splits, dist.AllToAllOptions()).wait()
        _put(output, whole)
        return _Done()

    def send(self, tensors: list[Tensor], destination: int, tag: int = 0) -> dist.Work:
        on_host = _copy(tensors[0])
        return _Transfer(self._inner.send([on_host], destination, tag), on_host)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> dist.Work:
        on_host = _like(tensors[0])
        return _Transfer(self._inner.recv([on_host], source, tag), on_host, tensors[0])

    def barrier(self, opts: Any = None) -> dist.Work:
        self._inner.barrier().wait()
        return _Done()

    def _start_coalescing(self, _device: torch.device) -> None:
        """Nothing is gained by sending several at once."""

    def _end_coalescing(self, _device: torch.device) -> dist.Work:
        return _Done()

    # As torch 2.13 calls them.
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base
