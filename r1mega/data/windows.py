"""Questions that are asked only from some update on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r1mega.data.prompts import PromptSource
from r1mega.types import DOMAIN_OF, Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence


class WindowedPrompts:
    """Hands out all prompts from update `general_from` on, and before it those that are not of a general domain.

    DeepSeek-R1 (section 3.2.2) brings general instruction data in for the last 400 of 1,700 updates. Both parts have an
    order of their own, fixed by the seed, and resume to the prompt.
    Raises ValueError where there is nothing to ask before `general_from`.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool, general_from: int) -> None:
        others = [prompt for prompt in prompts if prompt.domain not in DOMAIN_OF.values()]
        if general_from and not others:
            raise ValueError(
                f"reward.preference_from: got {general_from}; all questions of data.train are general, none could be "
                "asked before; set it to 0, or add questions of other domains"
            )
        self._all = PromptSource(prompts, seed, shuffle)
        self._before = PromptSource(others, seed, shuffle) if general_from else None
        self._general_from, self._update = general_from, 0

    def begin(self, update: int) -> None:
        """A round begins after so many updates."""
        self._update = update

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; over the end of an epoch it goes on with the next epoch."""
        if self._before is not None and self._update < self._general_from:
            return self._before.next(count)
        return self._all.next(count)

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        state = self._all.state_dict()
        return state if self._before is None else state | {"before": self._before.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed, `shuffle` or the window differ."""
        if ("before" in state) != (self._before is not None):
            raise ValueError(
                "reward.preference_from: 0 is another order of questions than any other update; resume with the run's"
            )
        self._all.load_state_dict(state)
        if self._before is not None:
            self._before.load_state_dict(state["before"])
