"""Memory before and after each phase of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

MEMORY_PREFIX = "memory/"
PEAK = "peak"  # since the figures were last read: of a phase, when read at its end


class PhaseMemory:
    """Reads figures as each phase starts and ends; called as `PhaseTimer` calls its `on_phase`.

    Of a phase that runs several times a round the first start and the last end are kept, and the largest peak.

    Args:
        read: gives the figures of this process, by name, in GB (1e9 bytes).
    """

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read
        self._current: str | None = None
        self._round: dict[str, float] = {}

    def __call__(self, phase: str | None) -> None:
        """A phase starts, or (None) the one at hand ends."""
        figures = dict(self._read())
        peak = figures.pop(PEAK, None)
        if phase is not None:
            self._current = phase
            for name, value in figures.items():
                self._round.setdefault(f"{MEMORY_PREFIX}{phase}/{name}_before", value)
            return
        assert self._current is not None, "no phase has started"
        for name, value in figures.items():
            self._round[f"{MEMORY_PREFIX}{self._current}/{name}_after"] = value
        if peak is not None:
            name = f"{MEMORY_PREFIX}{self._current}/{PEAK}"
            self._round[name] = max(peak, self._round.get(name, 0.0))
        self._current = None

    def finish_round(self) -> dict[str, float]:
        """The figures since the last call, as metrics: `memory/PHASE/NAME_before` and `_after`, `memory/PHASE/peak`."""
        figures, self._round = self._round, {}
        return figures


def largest(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure of the rank where it is largest."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = max(value, found.get(name, value))
    return found
