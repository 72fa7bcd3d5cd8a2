"""The files of one checkpoint directory against its manifest.json: sizes, digests and what the run said about it.

    {"format": 1, "update": 12, "files": {"model/__0_0.distcp": {"bytes": 4096, "blake2b": "..."}, ...},
     "manifest_blake2b": "...", FACT: ...}

`manifest_blake2b` covers all the rest of the content, so that a damaged fact is found as well as a damaged file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST, FORMAT = "manifest.json", 1
RESERVED = ("format", "update", "files", "manifest_blake2b")
_PIECE = 8 << 20
_THREADS = 8  # hashlib releases the GIL; each thread holds one piece in memory


def name_of(update: int) -> str:
    """The directory of an update's checkpoint."""
    return f"update-{update:06d}"


def update_of(name: str) -> int | None:
    """The update of a directory named exactly as `name_of` names it, or None."""
    match = re.fullmatch(r"update-([0-9]{6,18})", name)
    return int(match[1]) if match and name_of(int(match[1])) == name else None


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as they will be read back. Raises ValueError where they are no JSON or take a reserved name."""
    try:
        # NaN and infinity are refused: most readers of JSON would refuse the manifest.
        plain: dict[str, Any] = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"facts that are no JSON ({error})") from error
    if taken := [key for key in RESERVED if key in plain]:
        raise ValueError(f"facts named {', '.join(taken)}")
    return plain


def digest_all(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, each flushed to disk first.

    Raises ValueError where the directory is missing, holds no file or something other than files and directories.
    """
    if not directory.is_dir():
        raise ValueError("nothing")
    sizes = _walk(directory)
    sizes.pop(MANIFEST, None)  # of an earlier commit that failed
    for file, size in sizes.items():
        if size is None:
            raise ValueError(f"{file}, neither file nor directory")
    if not sizes:
        raise ValueError("no file")
    files = sorted(sizes)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: _digest(directory / file, sync=True), files), strict=True))


def write_manifest(directory: Path, update: int, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the manifest and flush it to disk; `files` as of `digest_all`, `facts` as of `plain_facts`."""
    manifest = {"format": FORMAT, "update": update, "files": dict(files), **facts}
    manifest["manifest_blake2b"] = _self_digest(manifest)
    write_synced(directory / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises OSError, and ValueError saying what about it is wrong."""
    try:
        # Without the refusal of constants Python's parser would let NaN and Infinity pass.
        manifest = json.loads((directory / MANIFEST).read_bytes(), parse_constant=_refuse_constant)
        if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
            raise ValueError("no object with a `format`")
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
        if manifest.get("manifest_blake2b") != _self_digest(manifest):
            raise ValueError("its content does not have the digest that it names")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST}: damaged: {error}") from error
    update, named = manifest.get("update"), update_of(directory.name.partition(".")[0])
    if type(update) is not int or named not in (None, update):
        raise ValueError(f"{MANIFEST}: of update {update!r}, expected {named}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST}: lists no files")
    for file, entry in files.items():
        if file == MANIFEST or "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
            raise ValueError(f"{MANIFEST}: lists {file!r}, expected paths inside the checkpoint")
        if not _is_entry(entry):
            raise ValueError(f"{MANIFEST}: {file}: expected `bytes` and `blake2b`")
    return manifest


def find_faults(directory: Path, quick: bool) -> list[str]:
    """What is wrong with the files of a checkpoint, by name; digests are compared unless `quick`.

    Raises OSError and ValueError where the manifest itself cannot be relied on.
    """
    listed = read_manifest(directory)["files"]
    sizes = _walk(directory)
    sizes.pop(MANIFEST, None)
    faults = {file: "not in the manifest, expected no such file" for file in sizes.keys() - listed.keys()}
    for file, entry in listed.items():
        if file not in sizes:
            faults[file] = f"missing, expected {entry['bytes']} bytes"
        elif sizes[file] is None:
            faults[file] = f"neither file nor directory, expected a file of {entry['bytes']} bytes"
        elif sizes[file] != entry["bytes"]:
            faults[file] = f"{sizes[file]} bytes, expected {entry['bytes']}"
    if not quick:
        rest = sorted(listed.keys() - faults.keys())
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda file: _digest_fault(directory / file, listed[file]), rest)
            faults.update((file, fault) for file, fault in zip(rest, found, strict=True) if fault)
    return [f"{file}: {faults[file]}" for file in sorted(faults)]


def write_synced(path: Path, text: str) -> None:
    """Write a file and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory, as after a rename, to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shared file systems know no such flush
            raise
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Delete a checkpoint, or whatever has its place. What resists is left, with a warning."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # as on NFS while another process has a file of it open: no reason to end a training
        warnings.warn(f"{path}: cannot be deleted now; the next save tries again", stacklevel=2)


def _walk(directory: Path | str, prefix: str = "") -> dict[str, int | None]:
    """Size by path inside `directory`; None for what is neither file nor directory (a link may lead outside)."""
    sizes: dict[str, int | None] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sizes.update(_walk(entry.path, f"{prefix}{entry.name}/"))
            else:
                plain = entry.is_file(follow_symlinks=False)
                sizes[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size if plain else None
    return sizes


def _digest(path: Path, sync: bool = False) -> dict[str, Any]:
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb", buffering=0) as file:
        piece = bytearray(min(_PIECE, os.fstat(file.fileno()).st_size) or 1)
        if sync:
            os.fsync(file.fileno())
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
            size += count
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _digest_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        found = _digest(path)
    except OSError as error:
        return f"cannot be read ({error.strerror}), expected {expected['bytes']} bytes"
    if found == expected:
        return None
    if found["bytes"] != expected["bytes"]:  # it has changed since its size was looked at
        return f"{found['bytes']} bytes, expected {expected['bytes']}"
    return f"blake2b {found['blake2b']}, expected {expected['blake2b']}"


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"bytes", "blake2b"}
        and type(entry["bytes"]) is int
        and isinstance(entry["blake2b"], str)
    )


def _self_digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_blake2b"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True, allow_nan=False).encode(), digest_size=16).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
