"""A copy of each published version on a disk, from which a restarted server loads, whatever way the others got theirs.

The weights are gathered into host memory, which is all that the trainer waits for. Files are written while the engines
generate; `newest` moves when those of all ranks are whole, which rank 0 learns from marks beside them.
"""

from __future__ import annotations

import time
from functools import partial

import torch.distributed as dist

from r1mega.parallel.collectives import share
from r1mega.types import TrainerWeights
from r1mega.weights.shelf import Shelf
from r1mega.weights.spread import Hand, SpreadWriter, WriteError, complete, part_of

_POLL_SECONDS = 0.1


class RecoveryCopy:
    """One rank's part.

    Args:
        writer: one that copies what it writes first (`snapshot`).
        group: all ranks, for objects.
    """

    def __init__(self, place: Shelf, writer: SpreadWriter, group: dist.ProcessGroup) -> None:
        self._place, self._writer, self._group = place, writer, group
        self._finisher = Hand() if writer.rank == 0 else None  # waits for the ranks beside the writing
        self._kept: tuple[int, ...] = ()

    def keep(self, weights: TrainerWeights, version: int) -> None:
        """Begin to write a version; `Shelf.newest` says when it stands. Collective.

        Raises WriteError on every rank where the version before could not be written.
        """
        self.settle()
        path, plan = self._place.path(version), self._writer.plan
        self._writer.gather(weights.shards(), path)
        # A server that started just before may still be loading the one before.
        self._kept = (*self._kept[-1:], version)
        if any(file.writer == self._writer.rank for file in plan.files):
            self._writer.after((part_of(path) / _mark(self._writer.rank)).touch)
        if self._finisher is not None:
            self._finisher.do(partial(self._finish, version, self._kept))

    def settle(self) -> None:
        """Wait until the version begun last stands whole. Collective; raises WriteError as `keep`."""
        self._writer.settle()  # of all ranks: from here on all marks are made
        fault = share(self._finisher.finish() if self._finisher is not None else None, self._group)
        if fault is not None:
            raise WriteError(f"{fault}; sglang.recovery_copy could not be put in its place; mend sglang.weights_dir")

    def _finish(self, version: int, kept: tuple[int, ...]) -> None:
        """Wait for all files, and make the version the newest."""
        path, plan = self._place.path(version), self._writer.plan
        marks = [part_of(path) / _mark(rank) for rank in sorted({file.writer for file in plan.files})]
        while not all(mark.exists() for mark in marks):
            time.sleep(_POLL_SECONDS)
        for mark in marks:
            mark.unlink()
        complete(path, plan, self._writer.model)
        self._place.set_newest(version)
        self._place.drop_others(*kept)


def _mark(rank: int) -> str:
    return f"written-{rank}"
