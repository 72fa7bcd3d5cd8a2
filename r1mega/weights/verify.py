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


def logprob_gap(rollout_logprobs: Sequence[torch.Tensor], trainer_logprobs: Sequence[torch.Tensor]) -> Gap:
    """Mean and largest absolute difference over the samples' tokens. Both sides hold one tensor [tokens] a sample."""
    differences = [(ours - theirs).abs() for ours, theirs in zip(rollout_logprobs, trainer_logprobs, strict=True)]
    largest = torch.stack([difference.max() for difference in differences])
    # NaN on either side is the worst gap there is, and max() hands it on.
    worst = int(torch.nan_to_num(largest, nan=float("inf")).argmax())
    return Gap(mean=float(torch.cat(differences).mean()), max=float(largest.max()), worst_sample=worst)


def require_agreement(gap: Gap, tolerance: float, *, version: int) -> None:
    """Raises RuntimeError where the largest gap is over the tolerance, or not a number."""
    if not gap.max <= tolerance:
        raise RuntimeError(
            f"rollout.probe: the engine's log-probs of its samples differ from the trainer's by up to {gap.max:.3g} "
            f"(mean {gap.mean:.3g}, sample {gap.worst_sample} of the round) at weight version {version}; must be at most "
            f"rollout.probe_tolerance={tolerance:g}; the engine is not generating with the trainer's weights"
        )
