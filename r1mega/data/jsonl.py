"""JSON Lines in, checked rows out: every complaint names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def read_rows(path: str | Path, text_keys: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file as `(line number from 1, object)`; blank lines are skipped.

    `text_keys` must be there in each row and hold text that is not blank. Numbers are accepted and turned into text,
    since many published sets store the answer as a bare number.

    Raises ValueError, naming `path:line`, when the file is missing or empty, a line is not a JSON object, or a key is
    missing, of another type, or blank.
    """
    rows = []
    for line in iter_lines(path, expected=_names(text_keys)):
        place = f"{path}:{line.number}"
        row = parse_object(place, line.raw)
        require_text(place, row, text_keys)
        rows.append((line.number, row))
    return rows


@dataclass(frozen=True)
class Line:
    """A line of a file that is not blank: its number from 1, the byte it begins at, its bytes."""

    number: int
    offset: int
    raw: bytes


def iter_lines(
    path: str | Path, *, expected: str = "(any)", note: Callable[[bytes], object] | None = None
) -> Iterator[Line]:
    """The lines of a JSONL file one by one, blank ones left out; `note` is given every byte of the file, in order.

    Raises ValueError when the file is missing, its error naming the `expected` keys, or has no line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file with the keys {expected}")
    offset, is_empty = 0, True
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if note is not None:
                note(raw)
            if raw.strip():
                is_empty = False
                yield Line(number, offset, raw)
            offset += len(raw)
    if is_empty:
        raise ValueError(f"{path}: the file is empty; at least one JSON object per line is expected")


def parse_object(place: str, raw: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError naming the place where it is none, or not UTF-8."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error.reason}, byte {error.start}); JSONL is expected") from error
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}): {line.strip()[:80]!r}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON object is expected, got {type(row).__name__}: {line.strip()[:80]!r}")
    return row


def require_text(place: str, row: dict[str, Any], text_keys: tuple[str, ...]) -> None:
    """The keys are there and hold text that is not blank; a number becomes text. Raises ValueError naming the place."""
    for key in text_keys:
        if key not in row:
            raise ValueError(f"{place}: key {key!r} is missing; the keys there are {_names(tuple(row))}")
        value = row[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = row[key] = str(value)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: {key!r} must be text that is not blank, got {str(value)[:80]!r}")


def _names(keys: tuple[str, ...]) -> str:
    return ", ".join(repr(key) for key in keys) or "(none)"
