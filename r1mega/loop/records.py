"""Metrics of an update, a round and an evaluation, by the names that displays and plots know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r1mega.types import FinishReason, Sample, SampleGroup


def update_metrics(
    means: Mapping[str, float], sums: Mapping[str, float], *, grad_norm: float, lr: float
) -> dict[str, float]:
    """Names and numbers of one RL update, from the loss's means and sums."""
    tokens = max(sums["num_tokens"], 1.0)
    values = {
        "train/loss": sums["loss"],
        "train/kl": means["kl"],
        "train/clip_fraction": means["clip_fraction"],
        "train/ratio_max": means["ratio_max"],
        "train/anchor_kl": means["anchor_kl"],
        "train/entropy": sums["entropy"] / tokens,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
    }
    if "correction" in sums:
        values["train/correction"] = sums["correction"] / tokens
        values["train/correction_capped"] = sums["correction_capped"] / tokens
    return values | expert_metrics(sums)


def expert_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """How evenly tokens fell on the experts; empty for a dense model.

    An expert's load is its tokens over its layer's mean: the largest of any layer, the mean of the layers' largest, and
    the share of experts without a token. Where the engine's choice of experts is replayed, also the share of tokens,
    over all layers, for which the trainer would have chosen another set.
    """
    layers, replayed = sums.get("expert_layers", 0.0), sums.get("replayed", 0.0)
    if not layers:
        return {}
    return {
        "moe/load_max": sums["expert_load_max"],
        "moe/load_mean": sums["expert_load_sum"] / layers,
        "moe/idle_experts": sums["experts_idle"] / layers,
    } | ({"moe/replay_disagreement": sums["replayed_otherwise"] / replayed} if replayed else {})


def round_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """Rewards and lengths of a round's samples. Failed rewards are counted, and left out of the means."""
    samples = [sample for group in groups for sample in group.samples]
    good = [sample for sample in samples if sample.score is not None and sample.score.error is None]
    lengths = [len(sample.token_ids) for sample in samples]
    mean = sum(lengths) / len(lengths)
    values = {
        "reward/failed": 1 - len(good) / len(samples),
        "rollout/response_tokens": mean,
        "rollout/response_tokens_min": float(min(lengths)),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/response_tokens_std": (sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5,
        "rollout/truncated": sum(sample.finish_reason == FinishReason.length for sample in samples) / len(samples),
    }
    if good:
        values["reward/mean"] = sum(sample.reward for sample in good) / len(good)
        # Not every reward judges every question: each mean is over those that it judged.
        for name in dict.fromkeys(name for sample in good for name in sample.score.parts):
            judged = [sample.score.parts[name] for sample in good if name in sample.score.parts]
            values[f"reward/{name}"] = sum(judged) / len(judged)
    # Groups whose rewards are all alike teach nothing: their advantages are zero.
    flat = [group for group in groups if len({sample.reward for sample in group.samples}) == 1]
    values["reward/flat_groups"] = len(flat) / len(groups)
    return values


def staleness(groups: Sequence[SampleGroup], version: int, step: int) -> dict[str, float]:
    """How many rounds of `step` updates the weights of the tokens are behind `version`: mean and largest."""
    spans = [span for group in groups for sample in group.samples for span in sample.spans]
    tokens = sum(span.end - span.start for span in spans)
    behind = sum((version - span.weight_version) * (span.end - span.start) for span in spans)
    oldest = min((span.weight_version for span in spans), default=version)
    return {
        "rollout/staleness_mean": behind / step / max(tokens, 1),
        "rollout/staleness_max": (version - oldest) / step,
    }


def evaluation_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """pass@1 and mean length over held-out questions; an answer whose check failed counts as wrong and is reported."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        "eval/pass_at_1": sum(_is_right(sample) for sample in samples) / len(samples),
        "eval/format": sum(sample.score.parts.get("format", 0.0) for sample in samples) / len(samples),
        "eval/failed": sum(sample.score.error is not None for sample in samples) / len(samples),
        "eval/response_tokens": sum(len(sample.token_ids) for sample in samples) / len(samples),
    }


def _is_right(sample: Sample) -> bool:
    return sample.score.error is None and sample.score.parts.get("accuracy", 0.0) == 1.0
