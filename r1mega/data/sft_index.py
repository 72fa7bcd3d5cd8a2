"""The rows of a file for supervised fine-tuning, read when they are needed: in memory is none of them.

An index beside the run, or in a directory of the user's, says of each row where it stands and how many tokens it has.
It is built in one pass, in which every row is checked, and holds for one file, tokenizer and template:

NAME-KEY.json            the file's path, size, time and digest; counts. Written last
NAME-KEY-DIGEST.bin      a record of _RECORD for each row
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import xxhash

from r1mega.data.jsonl import Line, iter_lines, parse_object
from r1mega.data.sft import SftExample, SftRow, row_of, tokenize_sft, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 1
_RECORD = np.dtype([("offset", "<i8"), ("size", "<i4"), ("line", "<i4"), ("tokens", "<i4"), ("learned", "<i4")])
_BATCH_ROWS, _BATCH_BYTES = 512, 4 << 20  # tokenized at once: enough for all threads of a tokenizer


@dataclass(frozen=True)
class Reading:
    """How a row becomes tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    keeps_thinking: bool = True

    def examples(self, rows: Sequence[SftRow]) -> list[SftExample]:
        """The rows tokenized, however long."""
        return tokenize_sft(rows, self.tokenizer, self.template, None, keeps_thinking=self.keeps_thinking)

    def key(self) -> str:
        """A digest of all that decides the tokens of a row besides its text."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
        parts |= {"padding": None, "truncation": None}  # which its use changes, and which decide nothing here
        decides = [
            _VERSION, parts,
            tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, self.template, self.keeps_thinking,
        ]  # fmt: skip
        return xxhash.xxh3_64_hexdigest(json.dumps(decides, default=str, sort_keys=True).encode())


class SftFile:
    """The rows of a file by their number, counted from 0; see `open_file`. `tokens` and `learned` are those of each
    row, mapped from the index."""

    def __init__(self, path: Path, header: dict[str, Any], records: np.ndarray, reading: Reading) -> None:
        self._path, self._reading, self._records = path, reading, records
        self.tokens, self.learned = records["tokens"], records["learned"]
        self.max_token_id = int(header["max_token_id"])
        self.content = f"{header['digest']}-{header['key']}"
        """What decides every token of every row: of another file, tokenizer or template it is another."""

    def __len__(self) -> int:
        return len(self._records)

    def examples(self, rows: Sequence[int]) -> list[SftExample]:
        """The rows of these numbers, read from the file and tokenized.

        Raises ValueError where they are not what they were when the index was built.
        """
        found = []
        with self._path.open("rb") as file:
            for row in rows:
                record = self._records[row]
                file.seek(int(record["offset"]))
                place = f"{self._path}:{record['line']}"
                found.append(row_of(place, parse_object(place, file.read(int(record["size"])))))
        examples = self._reading.examples(found)
        for row, read, example in zip(rows, found, examples, strict=True):
            counts = (len(example.token_ids), sum(example.loss_mask))
            if counts != (int(self.tokens[row]), int(self.learned[row])):
                raise ValueError(f"{read.id}: this row has changed since the run began; start it again")
        return examples

    def require(self, max_tokens: int, limit: str = "sft.max_length") -> None:
        """Raises ValueError, naming its line, for the first row of more than `max_tokens` tokens."""
        over = np.flatnonzero(self.tokens > max_tokens)
        if len(over):
            row = int(over[0])
            place = f"{self._path}:{self._records['line'][row]}"
            raise ValueError(too_long(place, int(self.tokens[row]), self._reading.template, max_tokens, limit))


def open_file(path: str | Path, directory: str | Path, reading: Reading, *, builds: bool = True) -> SftFile:
    """The file's rows by the index in `directory`, which is built where there is none, or the file has changed.

    A file of the same size and time is taken for the same; of another time, it is if its digest is.

    Raises:
        ValueError: as the reading of a row does, naming `path:line`; no valid index where it must not be built.
    """
    path, directory, key = Path(path), Path(directory), reading.key()
    header_path = _header_path(path, directory, key)
    header = _valid_header(path, header_path)
    if header is None and not builds:
        raise ValueError(
            f"{header_path}: no index of {path} is there; sft.index_dir, or else run.dir, must be a directory that "
            "every machine of the run sees"
        )
    if header is None:
        header = _build(path, header_path, reading, key)
    records = np.memmap(directory / header["records"], dtype=_RECORD, mode="r")
    return SftFile(path, header, records, reading)


def is_indexed(path: str | Path, directory: str | Path) -> bool:
    """Whether some index there, whatever its tokenizer, was built of the file as it is: then its rows were checked."""
    found = Path(directory).glob(f"{glob.escape(Path(path).stem)}-*.json")
    return any(_is_same(Path(path), json.loads(header.read_text("utf-8"))) for header in found)


def _header_path(path: Path, directory: Path, key: str) -> Path:
    name = xxhash.xxh3_64_hexdigest(f"{path.resolve()}\0{key}".encode())
    return directory / f"{path.stem}-{name}.json"


def _valid_header(path: Path, header_path: Path) -> dict[str, Any] | None:
    """The header of an index that is of the file as it is; None where there is none."""
    if not header_path.is_file() or not path.is_file():
        return None
    header = json.loads(header_path.read_text("utf-8"))
    records = header_path.parent / header["records"]
    if not records.is_file() or records.stat().st_size != header["rows"] * _RECORD.itemsize:
        return None
    if _is_same(path, header):
        return header
    if path.stat().st_size != header["size"] or _digest(path) != header["digest"]:
        return None
    header["mtime_ns"] = path.stat().st_mtime_ns
    _write_header(header_path, header)
    return header


def _is_same(path: Path, header: dict[str, Any]) -> bool:
    stat = path.stat()
    return (header["path"], header["size"], header["mtime_ns"]) == (str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def _build(path: Path, header_path: Path, reading: Reading, key: str) -> dict[str, Any]:
    """Reads the file once; memory does not grow with it."""
    stat = path.stat() if path.is_file() else None
    digest = xxhash.xxh3_128()
    header_path.parent.mkdir(parents=True, exist_ok=True)
    beside = header_path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as out:
            counts = _write_records(iter_lines(path, note=digest.update), out, path, reading)
        if (path.stat().st_size, path.stat().st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise ValueError(f"{path}: the file changed while it was read; let it be, and start again")
        records = header_path.with_name(f"{header_path.stem}-{digest.hexdigest()[:16]}.bin")
        beside.replace(records)
    finally:
        beside.unlink(missing_ok=True)
    header = {
        "path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest.hexdigest(),
        "key": key, "records": records.name, **counts,
    }  # fmt: skip
    _write_header(header_path, header)
    return header


def _write_records(lines: Iterator[Line], out: BinaryIO, path: Path, reading: Reading) -> dict[str, int]:
    counts = {"rows": 0, "tokens": 0, "learned": 0, "max_token_id": 0}
    for batch in _batches(lines):
        places = [f"{path}:{line.number}" for line in batch]
        rows = [row_of(place, parse_object(place, line.raw)) for place, line in zip(places, batch, strict=True)]
        records = np.empty(len(batch), dtype=_RECORD)
        for at, (line, example) in enumerate(zip(batch, reading.examples(rows), strict=True)):
            sizes = (len(example.token_ids), sum(example.loss_mask))
            records[at] = (line.offset, len(line.raw), line.number, *sizes)
            counts["max_token_id"] = max(counts["max_token_id"], *example.token_ids)
        out.write(records.tobytes())
        counts["rows"] += len(batch)
        for name in ("tokens", "learned"):
            counts[name] += int(records[name].sum())
    return counts


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.raw)
        if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_header(path: Path, header: dict[str, Any]) -> None:
    beside = path.with_suffix(f".{os.getpid()}.json.tmp")
    beside.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
