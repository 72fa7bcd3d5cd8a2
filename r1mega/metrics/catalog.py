"""The metric names a run reports, with the label and the number format every display uses for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PHASES = ("rollout", "reward", "inference", "train", "publish", "evaluate")
TIME_PREFIX = "time/"


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _significant(value: float) -> str:
    return f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Metric:
    """How one metric is shown. `short` is its name in the one-line form, `format` turns a finite number into text."""

    name: str
    label: str
    short: str
    format: Callable[[float], str] = _significant


# In the order of display: a display short of room leaves out the last ones.
_METRICS = (
    Metric("reward/mean", "reward", "reward", _fixed(3)),
    Metric("eval/pass_at_1", "held-out pass@1", "pass@1", _percent),
    Metric("reward/accuracy", "accuracy", "acc", _percent),
    Metric("reward/format", "format", "format", _percent),
    Metric("reward/helpful", "helpful model", "helpful", _fixed(3)),
    Metric("reward/safety", "safety model", "safety", _percent),
    Metric("eval/accuracy", "held-out accuracy", "held-out", _percent),
    Metric("train/accuracy", "accuracy in training", "right", _percent),
    Metric("rollout/response_tokens", "response tokens", "len", _fixed(1)),
    Metric("train/loss", "loss", "loss", _fixed(4)),
    Metric("train/kl", "KL to reference", "kl", _significant),
    Metric("train/clip_fraction", "clip fraction", "clip", _percent),
    Metric("train/grad_norm", "gradient norm", "gnorm", _significant),
    Metric("train/entropy", "entropy", "entropy", _fixed(3)),
    Metric("train/lr", "learning rate", "lr", _significant),
    Metric("perf/tokens_per_second", "tokens/s", "tok/s", _count),
    Metric("sync/logprob_gap_mean", "log-prob gap", "gap", _significant),
    Metric("rollout/truncated", "truncated", "cut", _percent),
    Metric("train/ratio_max", "largest ratio", "ratio", _significant),
    Metric("sync/logprob_gap_max", "log-prob gap, max", "gapmax", _significant),
    Metric("rollout/response_tokens_max", "longest response", "maxlen", _count),
    Metric("moe/load_max", "largest expert load", "load", _fixed(2)),
    Metric("moe/replay_disagreement", "experts chosen otherwise", "replay", _percent),
    Metric("eval/response_tokens", "held-out tokens", "evallen", _fixed(1)),
    Metric("sync/probe_gap_max", "publish probe, max", "probe", _significant),
    Metric("memory/train/rss_after", "trainer's memory, GB", "rss", _fixed(2)),
    Metric("memory/train/peak", "trainer's peak, GB", "peak", _fixed(2)),
)
CATALOG: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}


def format_value(name: str, value: float) -> str:
    """The value of metric `name` as text; names outside the catalog get three significant digits."""
    if not math.isfinite(value):
        return str(value)
    metric = CATALOG.get(name)
    return metric.format(value) if metric else _significant(value)


def format_seconds(seconds: float) -> str:
    """A duration for people: `0.4s`, `12s`, `3m20s`, `5h07m`, `8d06h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
