"""Accumulates numbers over samples and micro-batches until they are reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Reduction(StrEnum):
    """How the values added under one name become one number."""

    mean = "mean"  # sum(weight * value) / sum(weight)
    sum = "sum"  # sum(weight * value)
    min = "min"
    max = "max"


@dataclass
class _Cell:
    reduction: Reduction
    value: float
    weight: float

    def absorb(self, value: float, weight: float) -> None:
        if self.reduction in (Reduction.mean, Reduction.sum):
            self.value += value
        elif math.isnan(value) or math.isnan(self.value):
            self.value = math.nan  # Python's min and max keep or drop a NaN depending on the order of arguments
        else:
            self.value = (min if self.reduction is Reduction.min else max)(self.value, value)
        self.weight += weight


class Meter:
    """Weighted means, sums, minima and maxima under slash-separated names.

    A mean over micro-batches of unequal size is exact when each micro-batch is added with its count as `weight`.
    NaN and infinities are kept, so a diverging run shows as such.
    """

    def __init__(self) -> None:
        self._cells: dict[str, _Cell] = {}

    def add(self, name: str, value: float, weight: float = 1.0, reduction: str = Reduction.mean) -> None:
        """Add one value. An entry of weight 0 says nothing and is dropped, whatever its value (an empty micro-batch).

        `reduction` is one of mean, sum, min, max and stays the same for a name until `flush`.
        Raises ValueError on a negative or non-finite weight, an unknown reduction, or one that changed.
        """
        kind = Reduction(reduction)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"metric {name}: weight {weight} must be finite and not negative")
        if weight == 0:
            return
        scaled = kind in (Reduction.mean, Reduction.sum)
        self._absorb(name, _Cell(kind, float(value) * weight if scaled else float(value), weight))

    def merge(self, other: Meter) -> None:
        """Add everything `other` holds, as if its values had been added here. `other` is left as it is.

        Meters can be pickled, so the meters of several processes are gathered and merged on one of them.
        """
        for name, cell in other._cells.items():
            self._absorb(name, cell)

    def flush(self) -> dict[str, float]:
        """The reduced value of every name, in the order first added; the meter is empty afterwards."""
        cells, self._cells = self._cells, {}
        return {
            name: cell.value / cell.weight if cell.reduction is Reduction.mean else cell.value
            for name, cell in cells.items()
        }

    def _absorb(self, name: str, cell: _Cell) -> None:
        known = self._cells.get(name)
        if known is None:
            self._cells[name] = _Cell(cell.reduction, cell.value, cell.weight)
            return
        if known.reduction is not cell.reduction:
            raise ValueError(f"metric {name} was added as {known.reduction} and now as {cell.reduction}; use two names")
        known.absorb(cell.value, cell.weight)
