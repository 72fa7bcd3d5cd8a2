"""The paper's own figures (reference.yaml), for a report to set beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

PATH = Path(__file__).with_name("reference.yaml")


@dataclass(frozen=True)
class Figure:
    """One published number: percent, but ratings."""

    model: str
    benchmark: str
    metric: str
    value: float
    table: str
    source: str


@cache
def figures() -> tuple[Figure, ...]:
    """All of them, in the order of the tables."""
    found = []
    for table in yaml.safe_load(PATH.read_text(encoding="utf-8"))["tables"]:
        for model, values in table["rows"].items():
            for column, value in zip(table["columns"], values, strict=True):
                benchmark, _, metric = column.partition(":")
                if value is not None:
                    found.append(Figure(model, benchmark, metric, float(value), table["name"], table["source"]))
    return tuple(found)


def of_benchmark(name: str) -> list[Figure]:
    """What the paper reports of one benchmark; the same figure of a model is given once, from the first table."""
    seen: set[tuple[str, str, float]] = set()
    found = []
    for figure in figures():
        key = (figure.model, figure.metric, figure.value)
        if figure.benchmark == name and key not in seen:
            seen.add(key)
            found.append(figure)
    return found
