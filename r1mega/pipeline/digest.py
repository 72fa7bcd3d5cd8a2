"""Digests of artifacts: SHA-256 of their bytes and names, worked out again only where a file has changed.

Size, time of change and inode of each file are kept beside its digest, as git does in its index: a checkpoint of a
terabyte is read once. What an artifact is called and where it lies does not enter; in a file that is no checkpoint the
pipeline's own directory counts as `.`, since reports name the model they are of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.config.choices import ArtifactKind
from r1mega.pipeline.files import read_json, write_json

CACHE_FILE = "digests.json"


class Digests:
    """Digests of the artifacts of one pipeline, remembered in `root/digests.json`."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._known: dict[str, list[Any]] = read_json(self._root / CACHE_FILE) or {}
        self._is_new = False

    def of(self, path: Path, kind: ArtifactKind) -> str:
        """The digest of a file, or of a directory: names and bytes of all files in it. Raises OSError."""
        path = path.absolute()
        if not path.is_dir():
            return self._file(path, plain=kind is ArtifactKind.checkpoint)
        digest = hashlib.sha256()
        for file in files_in(path):
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}\0{self._file(file, plain=kind is ArtifactKind.checkpoint)}\n".encode())
        return digest.hexdigest()

    def save(self) -> None:
        """Write what has been worked out since, if anything was; nothing where the pipeline has no directory yet."""
        if self._is_new and self._root.is_dir():
            write_json(self._root / CACHE_FILE, {name: self._known[name] for name in sorted(self._known)})
            self._is_new = False

    def _file(self, path: Path, *, plain: bool) -> str:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        key = f"{path}{'' if plain else ' less its place'}"
        known = self._known.get(key)
        if known is not None and known[:3] == stamp:
            return known[3]
        found = _plain(path) if plain else _placeless(path, str(self._root).encode())
        self._known[key] = [*stamp, found]
        self._is_new = True
        return found


def files_in(directory: Path) -> Iterator[Path]:
    """All files below a directory in the order of their names."""
    return iter(sorted(path for path in directory.rglob("*") if path.is_file()))


def counts_of(path: Path) -> dict[str, int]:
    """What can be counted of an artifact: files and bytes, and of a JSONL file its rows."""
    if path.is_dir():
        sizes = [file.stat().st_size for file in files_in(path)]
        return {"files": len(sizes), "bytes": sum(sizes)}
    counts = {"bytes": path.stat().st_size}
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            counts = {"rows": sum(bool(line.strip()) for line in lines)} | counts
    return counts


def of_values(values: Any) -> str:
    """The digest of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _plain(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _placeless(path: Path, root: bytes) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as lines:
        for line in lines:  # of JSON and JSONL, which have no line that a machine could not hold
            digest.update(line.replace(root, b"."))
    return digest.hexdigest()
