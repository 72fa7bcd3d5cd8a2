"""Does every engine compute what the trainer computes? Log-probs of fixed sequences, after each publish.

Checksums say that the bytes have arrived; this says that they are used as the trainer uses them (a config, a rope, a
mask, a dtype), and stands where checksums do not: embedded engines, shares below 1, copies of experts. It does not see
what changes log-probs by less than rounding does, as one flipped bit or, in bf16, the weights of one update before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.parallel.collectives import gather

# Mean difference of a log-prob, by the coarsest arithmetic of either side (all ours).
LIMITS = {
    "fp32": 1e-4,  # sums in another order; measured 1e-6 on CPU
    "bf16": 0.05,  # 8 bits of mantissa; measured 0.007 on CPU with 4 layers, room for more is a guess
    "fp8": 0.1,  # 3 bits of mantissa in weights, activations or cache; a guess, never measured
}
# The tokens that differ most are left out of the mean: where two experts score alike, rounding decides which is taken,
# and a few tokens differ much with equal weights. Other weights move nearly every token.
LEFT_OUT = 0.1
MAX_TOKENS = 256  # of a sequence: enough to see rope and masks at work, and still nothing beside a rollout

Ask = Callable[[Sequence[Sequence[int]]], Mapping[str, Sequence[Sequence[float]]]]


@dataclass(frozen=True)
class Reading:
    """What one engine's log-probs say: the mean over the tokens that count, the largest, and words where it is too
    much."""

    mean: float
    max: float
    fault: str | None


class PublishProbe:
    """The fixed sequences, and who is asked for their log-probs.

    Args:
        sequences: token ids, two at least in each.
        ask: sequences -> log-probs at temperature 1 of every token but the first, by each engine that this rank speaks
            to, by its name; none on ranks that speak to no engine.
        arithmetic: a key of LIMITS.
        group: all ranks, for objects.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], ask: Ask, arithmetic: str, group: dist.ProcessGroup) -> None:
        assert all(len(sequence) > 1 for sequence in sequences)
        self.sequences = [tuple(sequence) for sequence in sequences]
        self._ask, self._arithmetic, self._group = ask, arithmetic, group
        self.metrics: dict[str, float] = {}  # of the last time

    def faults(self, trainer: Sequence[torch.Tensor]) -> list[str]:
        """Which engines differ too much from the trainer's log-probs, one tensor a sequence. Collective."""
        own = {name: reading(trainer, found, self._arithmetic) for name, found in self._ask(self.sequences).items()}
        readings = {name: one for part in gather(own, self._group) for name, one in part.items()}
        self.metrics = {
            "sync/probe_gap_mean": max(one.mean for one in readings.values()),
            "sync/probe_gap_max": max(one.max for one in readings.values()),
        }
        return [f"{name}: {one.fault}" for name, one in readings.items() if one.fault]


def reading(trainer: Sequence[torch.Tensor], engine: Sequence[Sequence[float]], arithmetic: str) -> Reading:
    """Compare log-probs of the same tokens, one entry a sequence."""
    given, wanted = [len(found) for found in engine], [len(expected) for expected in trainer]
    if given != wanted:
        return Reading(math.inf, math.inf, f"gave {given} log-probs of the probe's sequences, not {wanted}")
    ours = torch.cat([expected.double().cpu() for expected in trainer])
    theirs = torch.cat([torch.tensor(found, dtype=torch.float64) for found in engine])
    # What is no number is the worst gap there is.
    gaps = torch.nan_to_num((ours - theirs).abs(), nan=math.inf, posinf=math.inf)
    counting = gaps.sort().values[: math.ceil(len(gaps) * (1 - LEFT_OUT))]
    mean, worst, limit = float(counting.mean()), int(gaps.argmax()), LIMITS[arithmetic]
    largest = float(gaps[worst])
    if mean <= limit and math.isfinite(largest):
        return Reading(mean, largest, None)
    sequence, token = _place(wanted, worst)
    return Reading(
        mean,
        largest,
        f"its log-probs of the probe differ from the trainer's by {mean:.3g} on average, the largest {LEFT_OUT:.0%} "
        f"left out; at most {limit:g} may ({arithmetic}); worst in sequence {sequence} at token {token}: trainer "
        f"{float(ours[worst]):.6g}, engine {float(theirs[worst]):.6g}",
    )


def _place(lengths: Sequence[int], index: int) -> tuple[int, int]:
    """(sequence, token of it) of an index into all log-probs; the first token has none."""
    for sequence, length in enumerate(lengths):
        if index < length:
            return sequence, index + 1
        index -= length
    raise AssertionError("no such token")
