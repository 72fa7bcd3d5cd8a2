"""Does the engine generate with the trainer's weights? The engine's log-probs of its own samples answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gap:
    """How far the engine's log-probs are from the trainer's, over all tokens of a round."""

    mean: float
    max: float
    worst_sample: int
    over: float  # share of the tokens whose gap is over the tolerance


def logprob_gap(
    rollout_logprobs: Sequence[torch.Tensor], trainer_logprobs: Sequence[torch.Tensor], tolerance: float
) -> Gap:
    """Absolute differences over the samples' tokens. Both sides hold one tensor [tokens] a sample."""
    differences = [(ours - theirs).abs() for ours, theirs in zip(rollout_logprobs, trainer_logprobs, strict=True)]
    largest = torch.stack([difference.max() for difference in differences])
    every = torch.cat(differences)
    # NaN on either side is the worst gap there is: max() and mean() hand it on, and it is not within any tolerance.
    worst = int(torch.nan_to_num(largest, nan=float("inf")).argmax())
    over = 1.0 - float((every <= tolerance).double().mean())
    return Gap(mean=float(every.mean()), max=float(largest.max()), worst_sample=worst, over=over)


def require_agreement(gap: Gap, tolerance: float, outliers: float, *, version: int) -> None:
    """Raises RuntimeError where the mean gap is over the tolerance, or more than a share `outliers` of the tokens is.

    Single tokens may be far apart with equal weights: where two experts score alike, rounding decides which is taken.
    Other weights move nearly every token.
    """
    if not (gap.mean <= tolerance and gap.over <= outliers):
        raise RuntimeError(
            f"rollout.probe: the engine's log-probs of its samples differ from the trainer's by "
            f"{gap.mean:.3g} on average and {gap.max:.3g} at most (sample {gap.worst_sample} of the round), "
            f"{gap.over:.2%} of the tokens by more than rollout.probe_tolerance={tolerance:g}, at weight version "
            f"{version}; at most {outliers:.2%} may; the engine is not generating with the trainer's weights"
        )
