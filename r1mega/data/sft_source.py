"""Which rows an update of supervised fine-tuning learns from, as numbers: they are read where they are computed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.algo.packing import Chunk
from r1mega.algo.window_packing import pack_window
from r1mega.data.order import EpochOrder


@dataclass(frozen=True)
class RowBatch:
    """The rows of one update; `chunks` are places in `rows` that are computed together, None where that is to be
    planned."""

    rows: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...] | None = None


class BatchSource:
    """Updates of `batch_size` rows, for ever; each epoch has its own permutation, fixed by the seed; resumes to the
    row."""

    def __init__(self, order: EpochOrder, batch_size: int) -> None:
        self._order, self._batch_size = order, batch_size

    @property
    def epoch(self) -> int:
        """The epoch the last row was taken from, counted from 0."""
        return self._order.epoch

    def next(self) -> RowBatch:
        """The next update; over the end of an epoch it goes on with the next epoch."""
        return RowBatch(tuple(self._order.next(self._batch_size)))

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed or `shuffle` differ."""
        if "window" in state:
            raise ValueError("data source: the saved state is of sft.packing=window, this run has batch")
        self._order.load_state_dict(state)


class WindowSource:
    """Updates of `chunks_per_update` chunks, cut from windows of rows that are packed at once (algo.window_packing).

    An epoch is cut into windows of like size, of `window` rows at most, so that no row comes again before all have come
    once, but for the few that wait, at most `chunks_per_update` chunks. The chunks of a window come in an order that
    the seed and the window's number decide, or, where the rows are not shuffled, in the order of the first of their
    rows. Rows that one window leaves over are the first of the next.

    Its state is where the window at hand began, what was left over by then, and how many updates of it were taken: from
    that it is packed again.

    Args:
        order: hands out the rows.
        lengths: tokens of each row.
        window: rows packed at once, at most; where they make too few chunks for an update, more windows join.
        max_tokens: the most tokens of a chunk.
        chunks_per_update: chunks of one update, over all data-parallel ranks.
    """

    def __init__(
        self, order: EpochOrder, lengths: Sequence[int], *, window: int, max_tokens: int, chunks_per_update: int
    ) -> None:
        if window < 1:
            raise ValueError(f"window: got {window}; must be at least 1")
        self._order, self._lengths, self._window = order, lengths, window
        self._max_tokens, self._per_update = max_tokens, chunks_per_update
        self._number = 0  # windows packed so far
        self._start: dict[str, Any] = order.state_dict()
        self._carried: list[Chunk] = []  # rows, chunk by chunk, left over when the window at hand began
        self._ready: list[Chunk] = []
        self._waiting: list[Chunk] = []
        self._taken = 0  # updates taken of the window at hand

    @property
    def epoch(self) -> int:
        """The epoch the last packed row was taken from, counted from 0."""
        return self._order.epoch

    def next(self) -> RowBatch:
        """The next update."""
        if self._taken * self._per_update == len(self._ready):
            self._begin(self._order.state_dict(), self._waiting)
        chunks = self._ready[self._taken * self._per_update :][: self._per_update]
        self._taken += 1
        rows = [row for chunk in chunks for row in chunk]
        places = iter(range(len(rows)))
        return RowBatch(tuple(rows), tuple(tuple(next(places) for _ in chunk) for chunk in chunks))

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return self._start | {
            "window": {
                "number": self._number,
                "taken": self._taken,
                "carried": [list(chunk) for chunk in self._carried],
                "rows": self._window,
                "max_tokens": self._max_tokens,
                "chunks_per_update": self._per_update,
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed, `shuffle` or the packing differ."""
        saved = state.get("window")
        if saved is None:
            raise ValueError("data source: the saved state is of sft.packing=batch, this run has window")
        for name, here in (
            ("rows", self._window),
            ("max_tokens", self._max_tokens),
            ("chunks_per_update", self._per_update),
        ):
            if saved[name] != here:
                raise ValueError(
                    f"data source: the saved state has windows of {name}={saved[name]}, this run has {here}; resume "
                    "with the packing of the run that was saved, or start a new run"
                )
        self._order.load_state_dict(state)
        if saved["number"]:
            self._number = saved["number"] - 1
            self._begin(self._order.state_dict(), saved["carried"])
        self._taken = saved["taken"]

    def _begin(self, start: dict[str, Any], carried: Sequence[Sequence[int]]) -> None:
        """Pack the next window, with what the one before has left."""
        self._start, self._carried = start, [list(chunk) for chunk in carried]
        self._number += 1
        self._taken = 0
        rows = [row for chunk in self._carried for row in chunk]
        places = iter(range(len(rows)))
        open_chunks = [[next(places) for _ in chunk] for chunk in self._carried]
        lengths = [int(self._lengths[row]) for row in rows]
        # More tokens than an update's chunks hold are more chunks than an update has.
        tokens = sum(lengths)
        while tokens <= self._per_update * self._max_tokens:
            fresh = self._order.next(self._next_size())
            fresh_lengths = [int(self._lengths[row]) for row in fresh]
            rows, lengths, tokens = rows + fresh, lengths + fresh_lengths, tokens + sum(fresh_lengths)
        ready, waiting = pack_window(
            lengths, max_tokens=self._max_tokens, multiple=self._per_update, carried=open_chunks
        )
        assert ready
        if self._order.shuffle:
            random.Random(f"{self._order.seed}/window {self._number}").shuffle(ready)
        else:
            ready.sort(key=min)
        self._ready = [[rows[place] for place in chunk] for chunk in ready]
        self._waiting = [[rows[place] for place in chunk] for chunk in waiting]

    def _next_size(self) -> int:
        """Rows of the window that begins where the order stands: an epoch has windows of like size."""
        size = self._order.num_items
        count = -(-size // self._window)
        at = self._order.position % size
        ends = (number * size // count for number in range(1, count + 1))
        return next(end for end in ends if end > at) - at
