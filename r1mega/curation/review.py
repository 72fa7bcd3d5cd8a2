"""A file that a person edits and gives back: which rows to keep, and in what words.

DeepSeek-R1's cold-start rows were refined by human annotators (arXiv 2501.12948, section 2.3.1). What comes back is
held against what was given out: every row is there once, and nothing but the annotator's three columns has changed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1mega.data.jsonl import read_rows

FIXED = ("id", "prompt", "response")
EDITABLE = ("keep", "edited_response", "note")
COLUMNS = ("id", "keep", "prompt", "response", "edited_response", "note")
YES, NO = ("yes", "y", "true", "1"), ("no", "n", "false", "0")
_CSV, _JSONL = ".csv", ".jsonl"


def read_originals(path: str | Path) -> list[dict[str, Any]]:
    """The rows to be reviewed, each with an `id`, its own or `path:line`. Raises ValueError for a malformed row, or an
    id that stands twice."""
    rows = [{"id": f"{path}:{line}"} | row for line, row in read_rows(path, ("prompt", "response"))]
    seen: set[str] = set()
    for row in rows:
        if not isinstance(row["id"], str):
            raise ValueError(f"{path}: id {row['id']!r} must be text")
        if row["id"] in seen:
            raise ValueError(f"{path}: id {row['id']!r} stands twice; a row is known by it")
        seen.add(row["id"])
    return rows


def write_review(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The file for the annotator, CSV or JSONL by its name: `keep`, `edited_response` and `note` are left blank.

    Raises ValueError where the name ends in neither.
    """
    given = [{name: row.get(name, "") if name in FIXED else "" for name in COLUMNS} for row in rows]
    if path.suffix == _JSONL:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
    elif path.suffix == _CSV:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, COLUMNS)
        writer.writeheader()
        writer.writerows(given)
        text = "\ufeff" + buffer.getvalue()  # by which spreadsheets know that it is UTF-8
    else:
        raise ValueError(f"{path}: got {path.suffix or 'no ending'!r}; must end in .csv or .jsonl")
    path.write_text(text, encoding="utf-8", newline="")


def read_review(
    originals: Sequence[dict[str, Any]], path: Path, is_sound: Callable[[str], bool]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the rows to keep, in their first order, with the annotator's words; counts).

    `is_sound` says whether an edited response has the wanted form. A row's `provenance.review` tells what was done.
    Raises ValueError with every fault there is: a row that is missing, strange, twice, changed where it must not be,
    without a decision, or edited into another form.
    """
    found, faults = _reviewed(path), []
    by_id: dict[str, dict[str, str]] = {}
    known = {row["id"]: row for row in originals}
    for place, row in found:
        name = row["id"]
        if name not in known:
            faults.append(f"{place}: id {name!r} was not given out; restore it, or take the row out")
        elif name in by_id:
            faults.append(f"{place}: id {name!r} stands twice; take one of them out")
        else:
            faults += _faults_of(place, row, known[name], is_sound)
        by_id.setdefault(name, row)
    faults += [
        f"{path}: row {name!r} is missing; restore it, and write no under keep" for name in known if name not in by_id
    ]
    if faults:
        shown = faults[:50] + ([f"{len(faults) - 50} more"] if len(faults) > 50 else [])
        raise ValueError("\n".join([f"{path}: {len(faults)} faults:", *(f"  {fault}" for fault in shown)]))
    kept, counts = [], {"given": len(originals), "kept": 0, "edited": 0, "dropped": 0}
    for original in originals:
        row = by_id[original["id"]]
        if row["keep"].strip().casefold() in NO:
            counts["dropped"] += 1
            continue
        kept.append(_edited(original, row))
        counts["kept"] += 1
        counts["edited"] += bool(row["edited_response"].strip())
    return kept, counts


def _edited(original: dict[str, Any], row: dict[str, str]) -> dict[str, Any]:
    edited, note = _plain(row["edited_response"]), row["note"].strip()
    is_edited = bool(edited.strip())
    review = {"edited": is_edited} | ({"note": note} if note else {})
    before = original.get("provenance")
    source = (before if isinstance(before, dict) else {}) | {"review": review}
    return original | {"response": edited if is_edited else original["response"], "provenance": source}


def _faults_of(place: str, row: dict[str, str], original: dict[str, Any], is_sound: Callable[[str], bool]) -> list[str]:
    faults = []
    for name in ("prompt", "response"):
        if _plain(row[name]) != _plain(original[name]):
            remedy = "; write changes under edited_response" if name == "response" else ""
            faults.append(f"{place}: {name} of {row['id']!r} is not as it was given out; restore it{remedy}")
    keep = row["keep"].strip().casefold()
    if keep not in (*YES, *NO):
        faults.append(f"{place}: keep of {row['id']!r}: got {row['keep']!r}; write yes or no")
    edited = _plain(row["edited_response"])
    if edited.strip() and keep in YES and not is_sound(edited):
        faults.append(f"{place}: edited_response of {row['id']!r} is broken: it has not the form of a response")
    return faults


def _reviewed(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(`path:row`, columns) of the annotator's file. Raises ValueError where it cannot be read as one."""
    if path.suffix == _JSONL:
        rows = [(f"{path}:{line}", row) for line, row in read_rows(path, ())]
    elif path.suffix == _CSV:
        rows = _csv_rows(path)
    else:
        raise ValueError(f"{path}: got {path.suffix or 'no ending'!r}; must end in .csv or .jsonl")
    for place, row in rows:
        missing = [name for name in COLUMNS if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{place}: {', '.join(missing)} must be there as text; the columns there are {list(row)}")
        strange = [str(name) for name in row if name not in COLUMNS]
        if strange:
            raise ValueError(f"{place}: {', '.join(strange)} is no column of a review; take it out")
    return rows


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)  # a chain of thought is longer than the 128 KiB of the library
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(f"{path}: row {number}", row) for number, row in enumerate(csv.DictReader(file), start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV in UTF-8 ({error}); save it as that") from error
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def _plain(text: str) -> str:
    """Line ends as we write them: spreadsheets write their own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
