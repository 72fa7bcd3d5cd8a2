"""Files of supervised rows -> one file: nothing twice, nothing of a benchmark, so much of each source.

DeepSeek-R1's mixture has 600K reasoning rows and 200K others (arXiv 2501.12948, section 2.3.3).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.texts import normalised
from r1mega.data.jsonl import read_rows
from r1mega.parallel.seed import derive

READ, KEPT = "read", "kept"
CONTAMINATED, DUPLICATE, OVER_LIMIT, OVER_SHARE = "contaminated", "duplicate", "over_limit", "over_share"


@dataclass(frozen=True)
class Source:
    """A file of {prompt, response} rows under a name: `limit` rows of it at most, `share` of the whole mixture."""

    name: str
    path: str
    limit: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Mixture:
    """The rows, by source and in the order of their files, and the counts of each source by what became of its rows."""

    rows: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]


@dataclass
class _Row:
    source: Source
    place: str
    row: dict[str, Any]
    fate: str = KEPT


def check_sources(sources: Sequence[Source]) -> None:
    """Raises ValueError where names are the same, limits are none, or shares are not those of a whole."""
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"sources: got {', '.join(names)}; every source needs a name of its own")
    for source in sources:
        if source.limit is not None and source.limit < 1:
            raise ValueError(f"limit of {source.name}: got {source.limit}; must be at least 1; or leave the source out")
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return
    shown = ", ".join(f"{source.name}={source.share}" for source in sources)
    if len(shares) < len(sources):
        raise ValueError(f"shares: got {shown}; give one to every source, or to none")
    if min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        raise ValueError(f"shares: got {shown}; they must be positive and add up to 1")


def mix(sources: Sequence[Source], *, seed: int = 0, benchmarks: Benchmarks | None = None) -> Mixture:
    """Read, drop, choose. Of rows with the same words in prompt and response that of the first source stays; which rows
    are left out over a limit or a share, the seed decides.

    Raises ValueError as `check_sources`, and naming `path:line` for a row that is malformed.
    """
    check_sources(sources)
    every = [
        _Row(source, f"{source.path}:{line}", row)
        for source in sources
        for line, row in read_rows(source.path, ("prompt", "response"))
    ]
    if benchmarks is not None:
        for one, match in zip(every, benchmarks.matches([one.row["prompt"] for one in every]), strict=True):
            if match:
                one.fate = CONTAMINATED
    seen: set[tuple[str, str]] = set()
    for one in every:
        if one.fate != KEPT:
            continue
        key = _key(one.row["prompt"]), _key(one.row["response"])
        one.fate = DUPLICATE if key in seen else KEPT
        seen.add(key)
    for source in sources:
        if source.limit is not None:
            _thin(every, source, source.limit, OVER_LIMIT, seed)
    for source, number in _numbers(sources, every).items():
        _thin(every, source, number, OVER_SHARE, seed)
    counts = {source.name: {READ: 0, KEPT: 0} for source in sources}
    for source in sources:
        fates = Counter(one.fate for one in every if one.source is source)
        counts[source.name] |= {READ: sum(fates.values()), **dict(sorted(fates.items()))}
    return Mixture([_written(one) for one in every if one.fate == KEPT], counts)


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(text: str) -> str:
    return normalised(text) or text.strip()


def _thin(every: Sequence[_Row], source: Source, number: int, fate: str, seed: int) -> None:
    """Leave so many rows of a source."""
    mine = [one for one in every if one.source is source and one.fate == KEPT]
    ordered = sorted(mine, key=lambda one: derive(seed, "mix", source.name, one.row["prompt"], one.row["response"]))
    for one in ordered[number:]:
        one.fate = fate


def _numbers(sources: Sequence[Source], every: Sequence[_Row]) -> dict[Source, int]:
    """Rows of each source in the largest mixture of these shares; none where no shares are given."""
    if any(source.share is None for source in sources):
        return {}
    there = Counter(one.source for one in every if one.fate == KEPT)
    shares = {source: Fraction(str(source.share)) for source in sources}
    total = min(there[source] / share for source, share in shares.items())
    return {source: int(total * share) for source, share in shares.items()}


def _written(one: _Row) -> dict[str, Any]:
    """The row with where it comes from: what it knew of that already, and its file."""
    known = one.row.get("provenance")
    came_from = known if isinstance(known, dict) else {}
    return one.row | {"provenance": came_from | {"source": one.source.name, "row": one.place}}
