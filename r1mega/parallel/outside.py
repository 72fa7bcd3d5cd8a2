"""A group that one rank of this world makes with processes that are none of it: the ranks of engines.

They meet at a store that this rank opens, and the group has nothing in common with the world's own. Both sides make it
by the same steps, those of SGLang 0.5.21 (`srt/utils/common.py`, `init_custom_process_group`): torch's own way to a
group needs all its ranks in one world.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_POLL_SECONDS = 0.05


def address_towards(host: str) -> str:
    """This machine's address as `host` can reach it. Raises OSError where there is no way there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: the system only chooses the way
        return probe.getsockname()[0]


class OutsideGroup:
    """Rank 0's side of the group. `port`: where the others find it from now on.

    Args:
        name: of the group, the same on both sides; the store may serve only this one.
        size: ranks of it, this one included.
        seconds: that a meeting may take.
        step_seconds: that one broadcast may take, once all take part in it.
    """

    def __init__(self, name: str, size: int, backend: str, *, seconds: float, step_seconds: float) -> None:
        self.name, self._size, self._backend = name, size, backend
        self._step = timedelta(seconds=step_seconds)
        # The system chooses the port, so no other program can take it in between.
        self._store: dist.Store | None = dist.TCPStore(
            "127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
        self.port: int = self._store.port
        self._group: dist.ProcessGroup | None = None
        self._under_way: list[tuple[dist.Work, torch.Tensor]] = []

    def meet(self) -> None:
        """Wait for the others. Raises RuntimeError where one does not come in time."""
        assert self._store is not None and self._group is None
        store = dist.PrefixStore(self.name, self._store)
        group, _ = distributed_c10d._new_process_group_helper(
            self._size, 0, [], dist.Backend(self._backend), store, group_name=self.name, timeout=self._step
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self._size)}
        self._group = group

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to broadcast tensors one by one; they must not change until `wait` has returned."""
        assert self._group is not None and not self._under_way
        for tensor in map(_movable, tensors):
            work = dist.broadcast(tensor, group_src=0, group=self._group, async_op=True)
            self._under_way.append((work, tensor))

    def wait(self) -> None:
        """Return when what `send` began has left. Raises RuntimeError where a rank is gone or too slow."""
        for work, _ in self._under_way:
            work.wait()
        if self._under_way and self._backend == "nccl":
            torch.cuda.current_stream().synchronize()  # `wait` makes only the stream wait
        self._under_way = []

    def close(self) -> None:
        """Leave the group, whatever state it is in; the others' part in a broadcast then fails. It can be repeated.

        Of gloo a broadcast that hangs is waited for, as long as it may take: nothing stops it.
        """
        if self._group is not None:
            distributed_c10d._abort_process_group(self._group)
            while self._backend == "gloo" and not all(work.is_completed() for work, _ in self._under_way):
                time.sleep(_POLL_SECONDS)
        self._under_way, self._group, self._store = [], None, None


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes in one piece; those of FP8 as plain bytes, as gloo knows no such numbers."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
