"""Seconds spent in each phase of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from r1mega.metrics.catalog import TIME_PREFIX


class PhaseTimer:
    """Times the phases of a round. One phase runs at a time; the same phase may be entered several times a round.

    `on_phase` is told the name of each phase as it starts and None as it ends (a display shows it). `synchronize` is
    called before each reading of the clock: on an accelerator the work of a phase is queued, and without waiting for it
    the next phase would be charged. `clock` returns seconds.
    """

    def __init__(
        self,
        on_phase: Callable[[str | None], None] | None = None,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._on_phase = on_phase
        self._synchronize = synchronize
        self._clock = clock
        self._current: str | None = None
        self._round: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    @property
    def current(self) -> str | None:
        """The phase that is running; None between phases."""
        return self._current

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the `with` block to `name`, also when it raises.

        Raises RuntimeError inside another phase: its seconds would be counted twice.
        """
        if self._current is not None:
            raise RuntimeError(f"phase {name!r} cannot start inside phase {self._current!r}: phases do not nest")
        self._current = name
        start = self._read()
        if self._on_phase is not None:
            self._on_phase(name)
        try:
            yield
        finally:
            self._current = None
            self.add(name, self._read() - start)
            if self._on_phase is not None:
                self._on_phase(None)

    def add(self, name: str, seconds: float) -> None:
        """Charge seconds measured elsewhere, such as rewards that ran beside the rollout. They may overlap a phase."""
        self._round[name] = self._round.get(name, 0.0) + seconds
        self._totals[name] = self._totals.get(name, 0.0) + seconds

    @property
    def totals(self) -> dict[str, float]:
        """Seconds per phase since the timer was made, the round in progress included."""
        return dict(self._totals)

    def finish_round(self) -> dict[str, float]:
        """Seconds per phase since the last call, in the order the phases first ran. Raises RuntimeError in a phase."""
        if self._current is not None:
            raise RuntimeError(f"the round cannot end inside phase {self._current!r}")
        seconds, self._round = self._round, {}
        return seconds

    def _read(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()


def as_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """Phase seconds under their metric names: `{"rollout": 1.5}` becomes `{"time/rollout": 1.5}`."""
    return {TIME_PREFIX + name: value for name, value in seconds.items()}
