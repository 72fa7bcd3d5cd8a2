"""What the fields of the rewards must keep: see check.py."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.choices import Loop, Sandbox
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

LANGUAGES = ("en", "zh", "ru", "ko", "ar", "el", "he", "hi")  # those of r1mega.reward.language

REWARD_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    *(
        (f"reward.{name}", ((">=", 0),))
        for name in ("accuracy", "format", "language", "length", "repetition", "helpful", "safety")
    ),
    ("reward.preference_from", ((">=", 0),)),
    ("reward.timeout_seconds", ((">", 0),)),
    ("reward.workers", ((">=", 0),)),
    ("reward.length_buffer", ((">=", 1),)),
    ("reward.max_failed_share", ((">=", 0), ("<=", 1))),
    ("reward.code_test_seconds", ((">", 0),)),
    ("reward.code_total_seconds", ((">", 0),)),
    ("reward.code_memory_mib", ((">=", 16),)),
)


def check_rewards(config: Config) -> Iterator[Fault]:
    """Rules between the rewards and the rest of an RL run."""
    reward = config.reward
    if config.stage.loop not in (Loop.rl, Loop.reject):
        return
    if reward.accuracy == 0 and reward.format == 0:
        constraint = "at least one weight must be positive"
        yield Fault("reward", "accuracy=0, format=0", constraint, "set reward.accuracy or reward.format")
    if reward.language_target is not None and reward.language_target not in LANGUAGES:
        constraint = f"must be one of {', '.join(LANGUAGES)}, or null"
        yield Fault("reward.language_target", reward.language_target, constraint, "choose one of them")
    if reward.workers == 0 and reward.sandbox is Sandbox.unsafe_rlimits:
        constraint = "without a worker, what programs leave behind cannot be told from the trainer's own processes"
        yield Fault("reward.sandbox", str(reward.sandbox), constraint, "set reward.workers or use bubblewrap")
    longest = min([config.rollout.max_tokens, *(change[-1] for change in config.rollout.max_tokens_from if change)])
    if config.stage.loop is Loop.rl and reward.length > 0 and reward.length_buffer > longest:
        constraint = f"must be at most rollout.max_tokens={longest}, or every response is penalised"
        yield Fault(
            "reward.length_buffer", str(reward.length_buffer), constraint, "lower it or raise rollout.max_tokens"
        )
