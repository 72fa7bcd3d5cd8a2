from __future__ import annotations

import math

import pytest

from r1mega.metrics.catalog import CATALOG, format_seconds, format_value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (3600 * 47 + 59, "47h00m"),
        (86400 * 8 + 3600 * 6, "8d06h"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/pass_at_1", 0.8754, "87.5%"),
        ("perf/tokens_per_second", 12345.6, "12,346"),
        ("sync/logprob_gap_max", 1.234e-6, "1.23e-06"),
        ("train/grad_norm", math.nan, "nan"),
        ("eval/pass_at_1", -math.inf, "-inf"),
        ("not/listed", 0.123456, "0.123"),
    ],
)
def test_values(name: str, value: float, text: str) -> None:
    assert format_value(name, value) == text


def test_short_names_tell_metrics_apart() -> None:
    assert len({metric.short for metric in CATALOG.values()}) == len(CATALOG)
