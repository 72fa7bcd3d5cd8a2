from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from r1mega.metrics.sparkline import ASCII_BLOCKS, BLOCKS, sparkline


def test_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([0, 2, 1, 1], 2) == "▄▄"  # both halves have mean 1: flat
    assert sparkline([1, math.nan, 3], 9) == "▁█"
    assert sparkline([0, 5], 2, ASCII_BLOCKS) == "_#"
    assert sparkline([], 5) == sparkline([math.inf], 5) == sparkline([1.0], 0) == ""


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=200), st.integers(1, 80))
def test_never_wider_than_asked_and_of_known_blocks(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, sum(map(math.isfinite, values)))
    assert set(line) <= set(BLOCKS)
