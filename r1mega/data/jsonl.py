"""JSON Lines in, checked rows out: every complaint names the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: str | Path, text_keys: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file as `(line number from 1, object)`; blank lines are skipped.

    `text_keys` must be there in each row and hold text that is not blank. Numbers are accepted and turned into text,
    since many published sets store the answer as a bare number.

    Raises ValueError, naming `path:line`, when the file is missing or empty, a line is not a JSON object, or a key is
    missing, of another type, or blank.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file with the keys {_names(text_keys)}")
    rows: list[tuple[int, dict[str, Any]]] = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append((number, _row(f"{path}:{number}", line, text_keys)))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 text ({error.reason}, byte {error.start}); JSONL is expected"
            ) from error
    if not rows:
        raise ValueError(f"{path}: the file is empty; at least one JSON object per line is expected")
    return rows


def _row(place: str, line: str, text_keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}): {line.strip()[:80]!r}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON object is expected, got {type(row).__name__}: {line.strip()[:80]!r}")
    for key in text_keys:
        if key not in row:
            raise ValueError(f"{place}: key {key!r} is missing; the keys there are {_names(tuple(row))}")
        value = row[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = row[key] = str(value)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: {key!r} must be text that is not blank, got {str(value)[:80]!r}")
    return row


def _names(keys: tuple[str, ...]) -> str:
    return ", ".join(repr(key) for key in keys) or "(none)"
