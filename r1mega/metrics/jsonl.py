"""JSON lines on disk: one record a line, readable while the run that writes them goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def split_nonfinite(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`values` with every NaN or infinite float replaced by None, and the names of those.

    JSON has no NaN and no infinity; a file that holds them is refused by most readers.
    """
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {name: None if name in bad else value for name, value in values.items()}, bad


class JsonlWriter:
    """Appends records to a file, each written in one piece and flushed, so a killed run loses at most one line.

    An existing file is continued. What a killed run left of an unfinished last line is cut off first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_unfinished_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises ValueError where it holds NaN or infinity (see `split_nonfinite`)."""
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with its line number, counted from 1. Blank lines are passed over.

    A last line without a newline that is not complete JSON is being written at this moment and is passed over too.
    Raises FileNotFoundError, and ValueError naming file and line where a line is not a JSON object.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode(), parse_constant=_refuse_constant)
            except ValueError as error:  # of the decoder, of the parser and of _refuse_constant
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
            yield number, record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")  # Python's parser would let NaN and Infinity pass


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
