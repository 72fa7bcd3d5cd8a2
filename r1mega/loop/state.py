"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunState:
    """The two clocks of a run, never mixed: rounds (rollouts) and updates (optimizer steps)."""

    round: int = 0
    update: int = 0
    evaluated_at: int = 0  # update count of the last evaluation
    exported_at: int = 0  # update count of the last intermediate export
