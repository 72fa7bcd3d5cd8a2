"""Rewards by name, and their weighted sum.

R1-Zero: Reward = Reward_accuracy + Reward_format with the same weight (arXiv 2501.12948, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from r1mega.reward.format import r1_zero_format
from r1mega.reward.math import accuracy, prepare_accuracy, quick_accuracy
from r1mega.types import Prompt, Reward, Score


@dataclass(frozen=True)
class Part:
    """One named reward.

    `quick` gives the same score where that is surely cheap, and None where it is not; `prepare` does the slow imports
    that a first call would wait for.
    """

    reward: Reward
    quick: Callable[[Prompt, str], Score | None]
    prepare: Callable[[], None] | None = None


PARTS: dict[str, Part] = {
    "accuracy": Part(reward=accuracy, quick=quick_accuracy, prepare=prepare_accuracy),
    "format": Part(reward=r1_zero_format, quick=r1_zero_format),
}


class Rule:
    """The weighted sum of named rewards.

    A Score's `parts` hold each reward's own value before its weight, `value` the weighted sum, `reason` and `error`
    those of the parts behind their names. A part that failed counts 0 in the sum and sets `error`.
    Raises ValueError for an empty set of weights, an unknown name, or a weight that is not a finite number.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError(f"reward weights are empty; give at least one of {', '.join(sorted(PARTS))}")
        for name, weight in weights.items():
            if name not in PARTS:
                raise ValueError(f"unknown reward {name!r} in the weights; the rewards are {', '.join(sorted(PARTS))}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight}")
        self.weights = dict(weights)

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self._sum({name: PARTS[name].reward(prompt, text) for name in self.weights})

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The same score when every part can be had at once, else None."""
        scores: dict[str, Score] = {}
        for name in self.weights:
            score = PARTS[name].quick(prompt, text)
            if score is None:
                return None
            scores[name] = score
        return self._sum(scores)

    def prepare(self) -> None:
        """Do the slow imports of every part now, so that no text pays for them."""
        for name in self.weights:
            prepare = PARTS[name].prepare
            if prepare is not None:
                prepare()

    def _sum(self, scores: dict[str, Score]) -> Score:
        return Score(
            value=sum(self.weights[name] * score.value for name, score in scores.items()),
            parts={name: score.value for name, score in scores.items()},
            reason="; ".join(f"{name}: {score.reason}" for name, score in scores.items() if score.reason),
            error="; ".join(f"{name}: {score.error}" for name, score in scores.items() if score.error) or None,
        )
