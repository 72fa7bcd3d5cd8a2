"""A series of numbers as one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=*#"  # for terminals whose encoding has no block characters


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """At most `width` characters, lowest value to the lowest block and highest to the highest.

    A longer series is cut into `width` runs of near equal length and each run is shown by its mean. A flat series is
    shown by a middle block. Values that are not finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    cells = min(width, len(finite))
    edges = [len(finite) * cell // cells for cell in range(cells + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    if high <= low:
        return blocks[len(blocks) // 2 - 1] * cells
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / (high - low) * top)] for mean in means)
