"""Rules of what changes during a run: lengths, general questions and the rewards of models, by the count of updates."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.choices import Loop
from r1mega.config.faults import Fault
from r1mega.config.schema import Config


def check_schedule(config: Config) -> Iterator[Fault]:
    """Faults of `rollout.max_tokens_from`, `reward.preference_from` and `data.general`."""
    yield from _check_max_tokens(config)
    yield from _check_preferences(config)


def _check_max_tokens(config: Config) -> Iterator[Fault]:
    rollout, name = config.rollout, "rollout.max_tokens_from"
    for change in rollout.max_tokens_from:
        if len(change) != 2:
            yield Fault(
                name, str(change), "must be a pair: an update and the tokens from there on", "write [UPDATE,TOKENS]"
            )
            return
    changes = sorted(rollout.max_tokens_from)
    last = config.algo.updates if config.stage.loop is Loop.rl else 0
    starts = [start for start, _ in changes]
    if len(set(starts)) < len(starts):
        yield Fault(name, str(changes), "gives two lengths for one update", "take one of them out")
    for start, tokens in changes:
        got = f"[{start}, {tokens}]"
        if tokens < 1:
            yield Fault(name, got, "a response has at least 1 token", "give the longest response in tokens")
        if start < 1:
            yield Fault(name, got, "update 0 has rollout.max_tokens", "give an update from 1 on, or set that field")
        elif start >= last:
            constraint = f"no update from {start} on is done: algo.updates={config.algo.updates}"
            if config.stage.loop is not Loop.rl:
                constraint = f"stage.loop={config.stage.loop} does no updates with rollouts"
            yield Fault(name, got, constraint, f"take it out ({name}=[]), or make the run longer")
    lengths = [rollout.max_tokens, *(tokens for _, tokens in changes)]
    keeps = rollout.carry_partial or rollout.max_staleness > 0
    if keeps and lengths != sorted(lengths):
        constraint = "must not fall where sequences go on in a later round, in which they would be too long already"
        remedy = "let lengths grow, or take rollout.carry_partial and rollout.max_staleness back to their defaults"
        yield Fault(name, str(lengths), constraint, remedy)


def _check_preferences(config: Config) -> Iterator[Fault]:
    reward, data, updates = config.reward, config.data, config.algo.updates
    if config.stage.loop is not Loop.rl:
        if data.general is not None:
            constraint = f"stage.loop={config.stage.loop} asks no questions of rounds"
            yield Fault("data.general", data.general, constraint, "set data.general=null")
        return
    if data.general is not None and reward.helpful == 0 and reward.safety == 0:
        constraint = "general questions have no answer to compare with, and no reward model judges them"
        yield Fault(
            "data.general", data.general, constraint, "set reward.helpful or reward.safety, or data.general=null"
        )
    if reward.preference_from >= updates >= 1 and reward.preference_from > 0:
        constraint = f"no update from there on is done: algo.updates={updates}"
        yield Fault("reward.preference_from", str(reward.preference_from), constraint, "lower it, or train longer")
