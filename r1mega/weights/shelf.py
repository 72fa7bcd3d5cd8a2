"""The folder that weights are published in as safetensors: one directory a version, the newest known by a link.

RUN_DIR/engines/
    model/            config.json and tokenizer as SGLang wants them, no weights
    addresses.json    URLs of the servers, and of a router before them
    processes.json    process ids of the servers, one each
    trainers-turn     stands there while the servers' memory is the trainer's
    version-000012/   a checkpoint; `newest` links to the last that is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A version that stands whole on the disk."""

    version: int
    path: Path


@dataclass(frozen=True)
class Addresses:
    """URLs of each server, and of the router that sequences are asked of, where there is one."""

    servers: list[str]
    router: str | None = None


class Shelf:
    """Names within the folder, and which version is the newest. Every method may run while servers read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self._addresses = folder / "addresses.json"
        self._newest = folder / "newest"
        self._processes = folder / "processes.json"
        self._turn = folder / "trainers-turn"

    def prepare(self) -> None:
        """Make the folder, without what a former start of the run left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def clear(self) -> None:
        """Remove the folder: what a run has trained stands in its exports and checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_addresses(self, addresses: Addresses) -> None:
        """Tell the training processes where the servers are; they stay there when they are started again."""
        self._addresses.write_text(json.dumps(asdict(addresses)), encoding="utf-8")

    def read_addresses(self) -> Addresses:
        """Where the servers are."""
        return Addresses(**json.loads(self._addresses.read_text(encoding="utf-8")))

    @property
    def is_trainers_turn(self) -> bool:
        """Whether no server may be started now: it would take the memory that trains."""
        return self._turn.exists()

    def set_turn(self, *, trainers: bool) -> None:
        """Say whose turn it is."""
        if trainers:
            self._turn.touch()
        else:
            self._turn.unlink(missing_ok=True)

    def set_processes(self, numbers: Sequence[int]) -> None:
        """Say which processes the servers are, at once."""
        beside = self._processes.with_suffix(".next")
        beside.write_text(json.dumps(list(numbers)), encoding="utf-8")
        os.replace(beside, self._processes)

    def processes(self) -> list[int]:
        """Process ids of the servers on the launcher's machine; each is the first of those that it consists of."""
        return json.loads(self._processes.read_text(encoding="utf-8")) if self._processes.exists() else []

    def path(self, version: int) -> Path:
        """The directory of a version."""
        return self.folder / f"version-{version:06d}"

    def newest(self) -> Published | None:
        """The version published last."""
        try:
            path = self.folder / os.readlink(self._newest)
        except FileNotFoundError:
            return None
        return Published(int(path.name.removeprefix("version-")), path)

    def set_newest(self, version: int) -> None:
        """Make a version that stands whole the newest, at once."""
        link = self._newest.with_suffix(".next")
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(version).name)
        os.replace(link, self._newest)

    def drop_others(self, *versions: int) -> None:
        """Remove all versions before the last of these but for these, one of which every server must have loaded.

        With what was begun of them. A later version, or the last of these once more, may be in the making.
        """
        for path in self.folder.glob("version-*"):
            version = int(path.name.removeprefix("version-").partition(".")[0])
            if version < max(versions) and (version not in versions or path.suffix):
                shutil.rmtree(path)


def folder_of(run_dir: Path | str, weights_dir: str | None) -> Path:
    """The folder of a run; in `weights_dir`, which other runs may use too, one of a name of its own."""
    run = Path(run_dir).absolute()
    if weights_dir is None:
        return run / "engines"
    return Path(weights_dir) / f"r1mega-{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
