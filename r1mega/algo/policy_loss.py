"""The GRPO loss (DeepSeek-R1, Eq. 1 and 2) and what is worth knowing about it.

Shape suffixes: T tokens of a micro-batch, S its sequences.

With r = policy / anchor, the loss is the sum over tokens of

    weight * ( -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3 ).

The weights hold the whole normalisation, divided by counts of the whole update (see `token_weights`), so the losses of
micro-batches and ranks add up to the loss of the update, however it is cut. A token of weight zero (prompt, padding, a
failed sample) takes part in nothing, whatever its other values are.

The clip may exceed 1: the 10 of DeepSeek-R1 gives the interval [-9, 11], whose lower end never binds. Nothing else
bounds a ratio: that of a negative advantage, and k3, grow as they do in the paper, and the metrics show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from r1mega.algo.kl import k3

RATIO_LEVELS = ("token", "sequence")

Metrics = dict[str, Tensor]


def policy_loss(
    policy_logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    reference_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    weights_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    sequence_ids_T: Tensor | None = None,
    num_sequences: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of one micro-batch, and its metrics.

    Args:
        policy_logprobs_T: of the weights being trained, differentiable.
        anchor_logprobs_T: of the weights at the start of the round.
        reference_logprobs_T: of the frozen copy; None where kl_coef is 0.
        advantages_T: the sample's advantage at each of its tokens.
        weights_T: non-negative.
        clip_low, clip_high: how far r may go below and above 1 before it stops counting, each >= 0.
        kl_coef: the factor of k3, >= 0.
        dual_clip: c > 1 bounds the term of a negative advantage by c |A| (arXiv 1912.09729); None for no bound.
        ratio_level: `token` takes r and k3 of each token. `sequence` is Eq. 1 to the letter: r and k3 of whole outputs,
            whose log-probs are the sums over their tokens of non-zero weight. Each token then carries the term of its
            sequence, so with weights of `sequence_mean` the loss is the mean over sequences.
        sequence_ids_T, num_sequences: for `sequence`: which sequence each token is of, 0 .. num_sequences - 1. A
            sequence must stand in one micro-batch of one rank as a whole.

    Returns:
        The loss (a scalar), and metrics without gradient, all scalars on the device of the loss. Keys that end in
        `_max` are maxima; every other is a sum over tokens. See `merge_metrics` and `mean_metrics`.

    Raises:
        ValueError: a setting out of range, a missing reference, missing sequence ids.
    """
    _check_settings(clip_low, clip_high, kl_coef, dual_clip, ratio_level, reference_logprobs_T is not None)
    active_T = weights_T != 0
    policy_T, anchor_T, reference_T, advantages_T = (
        # Replaced before any arithmetic that could overflow: zero times infinity would not be zero.
        None if values_T is None else torch.where(active_T, values_T, 0.0)
        for values_T in (policy_logprobs_T, anchor_logprobs_T, reference_logprobs_T, advantages_T)
    )
    if ratio_level == "sequence":
        policy_T, anchor_T, reference_T = _whole_outputs(
            (policy_T, anchor_T, reference_T), sequence_ids_T, num_sequences
        )
    log_ratio_T = policy_T - anchor_T
    low_T, high_T = _log_bounds(advantages_T, clip_low, clip_high, dual_clip)
    # min(r A, clip(r) A) is clamp(r) A with the bounds that bind for the sign of A. Clamping the logarithm keeps exp
    # finite, so a ratio far outside has gradient zero and not zero times infinity.
    surrogate_loss = -(weights_T * advantages_T * torch.exp(torch.clamp(log_ratio_T, low_T, high_T))).sum()
    kl_T = torch.zeros_like(policy_T) if reference_T is None else k3(policy_T, reference_T)
    kl_loss = kl_coef * (weights_T * kl_T).sum() if kl_coef > 0 else torch.zeros_like(surrogate_loss)
    metrics = _metrics(log_ratio_T.detach(), low_T, high_T, kl_T.detach(), active_T)
    metrics |= {"surrogate_loss": surrogate_loss.detach(), "kl_loss": kl_loss.detach()}
    return surrogate_loss + kl_loss, metrics


def merge_metrics(parts: Iterable[Metrics]) -> Metrics:
    """The metrics of several micro-batches or ranks as those of one: maxima of `_max` keys, sums of the others."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith("_max"):
                merged[name] = torch.maximum(merged[name], value)
            else:
                merged[name] = merged[name] + value
    return merged


def mean_metrics(merged: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers for a log from the merged metrics of an update.

    `surrogate_loss` and `kl_loss` are the two parts of the loss. Means over tokens: `ratio`, `kl` (k3 to the
    reference), `anchor_kl` (k3 of anchor to policy: how far the weights are off those of the round's start),
    `clip_fraction` and its two sides `clip_fraction_low`, `clip_fraction_high`. Extremes: `ratio_max`, `ratio_min`,
    `kl_max`.
    """
    number = {name: float(value) for name, value in merged.items()}
    count = max(number["num_tokens"], 1.0)
    inverse = number["inverse_ratio_max"]
    return {
        "num_tokens": number["num_tokens"],
        "surrogate_loss": number["surrogate_loss"],
        "kl_loss": number["kl_loss"],
        "ratio": number["ratio"] / count,
        "ratio_max": number["ratio_max"],
        "ratio_min": 1.0 / inverse if inverse > 0 else 0.0,
        "kl": number["kl"] / count,
        "kl_max": number["kl_max"],
        "anchor_kl": number["anchor_kl"] / count,
        "clip_fraction": (number["clipped_low"] + number["clipped_high"]) / count,
        "clip_fraction_low": number["clipped_low"] / count,
        "clip_fraction_high": number["clipped_high"] / count,
    }


def _metrics(log_ratio_T: Tensor, low_T: Tensor, high_T: Tensor, kl_T: Tensor, active_T: Tensor) -> Metrics:
    """Sums and maxima over the active tokens. The maxima are of non-negative numbers, so none is 0."""
    zero = torch.zeros(1, dtype=log_ratio_T.dtype, device=log_ratio_T.device)

    def largest(values_T: Tensor) -> Tensor:
        return torch.cat([zero, torch.where(active_T, values_T, 0.0)]).amax()

    def total(values_T: Tensor) -> Tensor:
        return torch.where(active_T, values_T, 0.0).sum()

    ratio_T = log_ratio_T.exp()
    return {
        "num_tokens": active_T.sum().to(log_ratio_T.dtype),
        "ratio": total(ratio_T),
        "ratio_max": largest(ratio_T),
        "inverse_ratio_max": largest(torch.exp(-log_ratio_T)),
        "kl": total(kl_T),
        "kl_max": largest(kl_T),
        "anchor_kl": total(k3(torch.zeros_like(log_ratio_T), log_ratio_T)),
        "clipped_low": total((log_ratio_T < low_T).to(log_ratio_T.dtype)),
        "clipped_high": total((log_ratio_T > high_T).to(log_ratio_T.dtype)),
    }


def _log_bounds(
    advantages_T: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Between which log ratios the term still depends on the ratio: only one side of the clip binds for each sign."""
    below = math.log(1.0 - clip_low) if clip_low < 1 else -math.inf
    above = math.log1p(clip_high)
    dual = math.inf if dual_clip is None else math.log(dual_clip)
    negative_T = advantages_T < 0
    low_T = torch.full_like(advantages_T, -math.inf).masked_fill(negative_T, below)
    high_T = torch.full_like(advantages_T, above).masked_fill(negative_T, dual)
    return low_T, high_T


def _whole_outputs(
    logprobs: Iterable[Tensor | None], sequence_ids_T: Tensor | None, num_sequences: int | None
) -> list[Tensor | None]:
    """Of each [T] of log-probs: the log-prob of the whole output at each of its tokens."""
    if sequence_ids_T is None or num_sequences is None:
        raise ValueError("ratio_level: got 'sequence' without sequence_ids_T and num_sequences; pass both")
    return [
        None
        if logprobs_T is None
        else logprobs_T.new_zeros(num_sequences).index_add(0, sequence_ids_T, logprobs_T)[sequence_ids_T]
        for logprobs_T in logprobs
    ]


def _check_settings(
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    dual_clip: float | None,
    ratio_level: str,
    has_reference: bool,
) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_coef", kl_coef)):
        if not value >= 0:
            raise ValueError(f"{name}: got {value}; must be >= 0; DeepSeek-R1 clips at 10 with kl_coef 0.001")
    if kl_coef > 0 and not has_reference:
        raise ValueError(f"kl_coef: got {kl_coef} without reference log-probs; pass them, or set kl_coef to 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: got {dual_clip}; must be above 1; leave it out for no bound")
    if ratio_level not in RATIO_LEVELS:
        raise ValueError(f"ratio_level: got {ratio_level!r}; must be one of {', '.join(RATIO_LEVELS)}")
