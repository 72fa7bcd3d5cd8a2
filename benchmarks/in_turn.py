"""Two ways of doing one thing, measured in turn, so that a slow hour of the machine weighs on both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from typing import Any


def compare(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, ...]]:
    """The medians of what each of two ways gives, a dataclass of numbers, and under `ratio` how many times the second's
    the first's are: the median of the rounds' own ratios."""
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, measure in ways.items():
            found[way].append(astuple(measure()))
    first, second = found.values()
    ratios = [[a / b for a, b in zip(one, other, strict=True)] for one, other in zip(first, second, strict=True)]
    return {way: _medians(values) for way, values in found.items()} | {"ratio": _medians(ratios)}


def _medians(rows: Iterable[Iterable[float]]) -> tuple[float, ...]:
    return tuple(map(statistics.median, zip(*rows, strict=True)))
