"""The folder that weights are published in as safetensors: one directory a version, the newest known by a link.

RUN_DIR/engines/
    model/            config.json and tokenizer as SGLang wants them, no weights
    addresses.json    URLs of the servers
    version-000012/   a checkpoint; `newest` links to the last that is whole
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A version that stands whole on the disk."""

    version: int
    path: Path


class Shelf:
    """Names within the folder, and which version is the newest. Every method may run while servers read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.addresses = folder / "addresses.json"
        self._newest = folder / "newest"

    def prepare(self) -> None:
        """Make the folder, without what a former start of the run left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def clear(self) -> None:
        """Remove the folder: what a run has trained stands in its exports and checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

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

    def drop_others(self, version: int) -> None:
        """Remove all versions but one, which every server must have loaded."""
        for path in self.folder.glob("version-*"):
            if path != self.path(version):
                shutil.rmtree(path)


def folder_of(run_dir: Path | str, weights_dir: str | None) -> Path:
    """The folder of a run; in `weights_dir`, which other runs may use too, one of a name of its own."""
    run = Path(run_dir).absolute()
    if weights_dir is None:
        return run / "engines"
    return Path(weights_dir) / f"r1mega-{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
