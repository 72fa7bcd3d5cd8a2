"""Deals what a set of copies has to send among them: whole numbers, no rank and no tensor asked for anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r1mega.weights.slices import Cargo


class Line:
    """Slices laid end to end, each of which may be cut after every one of its steps. All in bytes."""

    def __init__(self, cargo: Sequence[Cargo]) -> None:
        self._sizes = np.array([item.nbytes for item in cargo], dtype=np.int64)
        self._steps = np.array([item.step_bytes for item in cargo], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self.nbytes = int(self._ends[-1]) if len(cargo) else 0

    def overlap(self, begin: int, end: int) -> range:
        """The slices that [begin, end) has a part of."""
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        return range(int(first), int(last) + 1)

    def start(self, index: int) -> int:
        """Where a slice begins."""
        return int(self._ends[index] - self._sizes[index])

    def snap(self, cuts: np.ndarray) -> np.ndarray:
        """The places nearest to `cuts`, each in [0, nbytes), where the line may be cut."""
        index = np.searchsorted(self._ends, cuts, side="right")
        size, step = self._sizes[index], self._steps[index]
        start = self._ends[index] - size
        # A step as long as its slice is rounded to one of the slice's ends.
        return start + np.minimum((cuts - start + step // 2) // step * step, size)


def level(loads: np.ndarray, work: int) -> np.ndarray:
    """How much of `work` each takes so that the least loaded fill up first and those that take any end up even.

    int64 [n] of a sum of `work`; of two that are even the first takes the odd byte.
    """
    order = np.argsort(loads, kind="stable")
    ascending = loads[order]
    below = np.cumsum(ascending)
    # What it takes to lift the first k to the k-th; as many as that leaves work for take part.
    needed = np.arange(1, len(loads) + 1) * ascending - below
    count = int(np.searchsorted(needed, work, side="right"))
    height, odd = divmod(work + int(below[count - 1]), count)
    gains = np.zeros(len(loads), dtype=np.int64)
    gains[order[:count]] = height - ascending[:count]
    gains[order[:odd]] += 1
    return gains


def deal(loads: np.ndarray, senders: np.ndarray, receivers: np.ndarray, line: Line) -> np.ndarray:
    """Who sends which part of a line, which every receiver needs whole; `loads` grows by what was dealt.

    The line is laid out once for each receiver, and all of that is cut into one stretch for each sender. So a sender
    serves few receivers, and a receiver has few senders; only the stretches' ends cut a slice.

    Args:
        loads: int64 [ranks], bytes that each rank sends already.
        senders: the ranks that hold a copy, ascending.
        receivers: numbers of the receivers, ascending.

    Returns:
        int64 [n, 4]: sender, receiver, first byte of the line, last byte (exclusive); no row is empty.
    """
    total = line.nbytes * len(receivers)
    ends = np.cumsum(level(loads[senders], total))
    inner = ends < total
    turn, within = np.divmod(ends[inner], line.nbytes)
    ends[inner] = turn * line.nbytes + line.snap(within)
    edges = np.unique(np.concatenate([[0], ends, np.arange(1, len(receivers) + 1) * line.nbytes]))
    begin, end = edges[:-1], edges[1:]
    sender = senders[np.searchsorted(ends, begin, side="right")]
    turn = begin // line.nbytes
    np.add.at(loads, sender, end - begin)
    return np.stack([sender, receivers[turn], begin - turn * line.nbytes, end - turn * line.nbytes], axis=1)
