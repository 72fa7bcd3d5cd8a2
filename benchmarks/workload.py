"""What every system in the GRPO step benchmark is given, and what it reports back. Imports no training library."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

NUM_PROMPTS = 8
SAMPLES_PER_PROMPT = 16
EQUAL_LENGTH = 48
MIXED_SHORTEST = 8
MIXED_LONGEST = 256
REGIMES = ("equal", "mixed")

# "publish" hands the new weights to a generator that has its own copy. "other" is what stands in no named phase:
# rewards, advantages, padding, the trainer's own loop.
PHASES = ("generate", "reference_forward", "policy_forward", "backward", "optimizer", "publish", "other")


@dataclass(frozen=True)
class StepReport:
    """One GRPO step: a rollout, the reference's log-probs, one update.

    `phases` has one entry per name of `PHASES` in seconds; they sum to `seconds`, the wall time of the whole step.
    `completion_tokens` counts generated tokens, end-of-sequence tokens included and padding excluded.
    """

    seconds: float
    completion_tokens: int
    phases: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second of the whole step."""
        return self.completion_tokens / self.seconds


class Peer(Protocol):
    """One system under test. Steps are taken one at a time, so that two systems can take turns."""

    name: str

    def step(self) -> StepReport:
        """Take one whole GRPO step and say where its time went."""

    def close(self) -> None:
        """Let go of threads and files."""


def make_prompts(seed: int = 0) -> list[str]:
    """`NUM_PROMPTS` addition questions in printable ASCII, 20 to 30 characters (and tokens) each."""
    rng = random.Random(seed)
    return [f"Compute {rng.randrange(10, 10**6)} + {rng.randrange(10, 10**6)} = ".ljust(20) for _ in range(NUM_PROMPTS)]


def make_lengths(regime: str, seed: int = 0) -> list[int]:
    """The length in tokens of every completion, prompt by prompt: sample j of prompt i is entry i * 16 + j.

    `equal` is 48 everywhere. `mixed` is a seeded log-uniform draw from 8 to 256 (the distribution's mean is
    72, its median 45), with its longest entry set to 256: the long tail that completions of a reasoning model have.
    Raises ValueError on an unknown regime.
    """
    count = NUM_PROMPTS * SAMPLES_PER_PROMPT
    if regime == "equal":
        return [EQUAL_LENGTH] * count
    if regime == "mixed":
        rng = random.Random(seed)
        low, high = math.log(MIXED_SHORTEST), math.log(MIXED_LONGEST)
        lengths = [round(math.exp(rng.uniform(low, high))) for _ in range(count)]
        lengths[lengths.index(max(lengths))] = MIXED_LONGEST
        return lengths
    raise ValueError(f"regime: got {regime!r}, must be one of {', '.join(REGIMES)}")


def reward(token_ids: Sequence[int]) -> float:
    """The share of even token ids: cheap, a function of the completion alone, and different within a group."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)
