"""Values that change during a run, by its count of updates; never by rounds.

A round (rollout) takes the value of its first update, so a change that falls inside a round comes with the next one.
Every value is a function of the configuration and the count alone: a resumed and a replayed run find the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1mega.config.schema import Config


def value_at(update: int, first: int, changes: Sequence[Sequence[int]]) -> int:
    """What holds at `update` (updates done before it, so the first one is update 0).

    `changes` are pairs of the update from which a value holds and the value, in any order; `first` holds before all.
    """
    begun = [(start, value) for start, value in changes if start <= update]
    return max(begun)[1] if begun else first


def max_tokens_at(config: Config, update: int) -> int:
    """Longest response of a round that begins at `update`."""
    return value_at(update, config.rollout.max_tokens, config.rollout.max_tokens_from)


def most_tokens(config: Config) -> tuple[str, int]:
    """The field that gives the longest response of any round, and its tokens."""
    longest = max((change[-1] for change in config.rollout.max_tokens_from if change), default=0)
    if longest > config.rollout.max_tokens:
        return "rollout.max_tokens_from", longest
    return "rollout.max_tokens", config.rollout.max_tokens


def has_preferences(config: Config, update: int) -> bool:
    """Whether general questions, and the rewards of models, belong to a round that begins at `update`."""
    return update >= config.reward.preference_from
