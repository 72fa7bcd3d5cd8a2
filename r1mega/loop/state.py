"""Where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunState:
    """The two clocks of a run, never mixed: rounds (rollouts) and updates (optimizer steps)."""

    round: int = 0
    update: int = 0
    evaluated_at: int = 0  # update count of the last evaluation
    exported_at: int = 0  # update count of the last intermediate export
    saved_at: int = 0  # update count of the last checkpoint

    def state_dict(self) -> dict[str, int]:
        """As plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        for name, value in state.items():
            setattr(self, name, int(value))
