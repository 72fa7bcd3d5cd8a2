"""Rewards by name, and their weighted sum; a question's domain says which of them judge its answers.

R1-Zero: Reward = Reward_accuracy + Reward_format with the same weight (arXiv 2501.12948, section 2.2). R1's RL stages
add the language reward to that (arXiv 2501.12948v2, Eq. 7 to 10).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from r1mega.reward.choice import choice_is_right
from r1mega.reward.code import CodeLimits, code_passes
from r1mega.reward.format import r1_zero_format
from r1mega.reward.language import language_share, prepare_language, quick_language
from r1mega.reward.math import accuracy, prepare_accuracy, quick_accuracy
from r1mega.reward.repetition import quick_repetition, repetition_penalty
from r1mega.types import DOMAINS, Prompt, Reward, Score

NAMES = ("accuracy", "format", "language", "repetition")


@dataclass(frozen=True)
class RuleSettings:
    """What rewards take besides prompt and text. `language` is the one to think in; None: that of each question.
    `elsewhere` are the domains that something else than rules judges too: there it is no fault that no rule does."""

    code: CodeLimits = field(default_factory=CodeLimits)
    language: str | None = None
    elsewhere: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    """One reward for the questions of one domain.

    `quick` gives the same score where that is surely cheap, and None where it is not; `prepare` does the slow imports
    that a first call would wait for; `seconds` is the time that one text may take, where the pool's is too short.
    """

    reward: Reward
    quick: Callable[[Prompt, str], Score | None]
    prepare: Callable[[], None] | None = None
    seconds: float | None = None


def parts_of(domain: str, settings: RuleSettings) -> dict[str, Part]:
    """The rewards that judge answers to questions of a domain, by name. A general question has no known answer.

    Raises ValueError for an unknown domain.
    """
    maths = Part(accuracy, quick_accuracy, prepare_accuracy)
    choice = Part(choice_is_right, choice_is_right)
    code = Part(partial(code_passes, limits=settings.code), _never, seconds=settings.code.hard_seconds)
    judges = {"math": maths, "code": code, "stem": choice, "choice": choice, "logic": _either(choice, maths)}
    if domain not in DOMAINS:
        raise ValueError(f"domain: got {domain!r}; must be one of {', '.join(DOMAINS)}")
    common = {
        "format": Part(r1_zero_format, r1_zero_format),
        "language": Part(_in_language(settings, language_share), _in_language(settings, quick_language),
                         prepare_language),
        "repetition": Part(repetition_penalty, quick_repetition),
    }  # fmt: skip
    return ({"accuracy": judges[domain]} if domain in judges else {}) | common


class Rule:
    """The weighted sum of named rewards.

    A Score's `parts` hold each reward's own value before its weight, `value` the weighted sum, `reason` and `error`
    those of the parts behind their names. A part that failed counts 0 in the sum and sets `error`, and so does a
    question that no reward of a weight other than 0 can judge.
    Raises ValueError for an empty set of weights, an unknown name, or a weight that is not a finite number.
    """

    def __init__(self, weights: Mapping[str, float], settings: RuleSettings | None = None) -> None:
        if not weights:
            raise ValueError(f"reward weights are empty; give at least one of {', '.join(sorted(NAMES))}")
        for name, weight in weights.items():
            if name not in NAMES:
                raise ValueError(f"unknown reward {name!r} in the weights; the rewards are {', '.join(sorted(NAMES))}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight}")
        self.weights = dict(weights)
        settings = settings or RuleSettings()
        self._elsewhere = settings.elsewhere
        self._parts = {
            domain: {name: parts[name] for name in weights if name in parts}
            for domain, parts in ((domain, parts_of(domain, settings)) for domain in DOMAINS)
        }

    def __call__(self, prompt: Prompt, text: str) -> Score:
        parts = self._parts.get(prompt.domain, {})
        if not any(self.weights[name] for name in parts) and prompt.domain not in self._elsewhere:
            return _no_reward(prompt, self.weights)
        return self._sum({name: part.reward(prompt, text) for name, part in parts.items()})

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The same score when every part can be had at once, else None."""
        parts = self._parts.get(prompt.domain, {})
        if not any(self.weights[name] for name in parts) and prompt.domain not in self._elsewhere:
            return _no_reward(prompt, self.weights)
        scores: dict[str, Score] = {}
        for name, part in parts.items():
            score = part.quick(prompt, text)
            if score is None:
                return None
            scores[name] = score
        return self._sum(scores)

    def seconds(self, prompt: Prompt) -> float | None:
        """The time that a text to this question may take, where it needs one of its own."""
        asked = [part.seconds for part in self._parts.get(prompt.domain, {}).values() if part.seconds is not None]
        return max(asked, default=None)

    def prepare(self) -> None:
        """Do the slow imports of every part now, so that no text pays for them."""
        for prepare in {part.prepare for parts in self._parts.values() for part in parts.values() if part.prepare}:
            prepare()

    def _sum(self, scores: dict[str, Score]) -> Score:
        return Score(
            value=sum(self.weights[name] * score.value for name, score in scores.items()),
            parts={name: score.value for name, score in scores.items()},
            reason="; ".join(f"{name}: {score.reason}" for name, score in scores.items() if score.reason),
            error="; ".join(f"{name}: {score.error}" for name, score in scores.items() if score.error) or None,
        )


def _no_reward(prompt: Prompt, weights: Mapping[str, float]) -> Score:
    names = ", ".join(name for name, weight in weights.items() if weight)
    return Score(0.0, error=f"{prompt.id}: no reward among {names} judges questions of domain {prompt.domain!r}")


def _never(prompt: Prompt, text: str) -> None:
    """Nothing about a program is known at once."""


def _either(choice: Part, otherwise: Part) -> Part:
    """The first where the question has options, the second where it has none."""

    def of(prompt: Prompt) -> Part:
        return choice if prompt.options else otherwise

    return Part(
        lambda prompt, text: of(prompt).reward(prompt, text),
        lambda prompt, text: of(prompt).quick(prompt, text),
        otherwise.prepare,
    )


def _in_language(settings: RuleSettings, judge: Callable[[Prompt, str], Score | None]) -> Callable:
    """`judge` with the language of the settings, for questions that name none themselves."""
    if settings.language is None:
        return judge

    def judged(prompt: Prompt, text: str) -> Score | None:
        return judge(prompt if prompt.language else replace(prompt, language=settings.language), text)

    return judged
