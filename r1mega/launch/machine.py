"""What `r1mega doctor` asks of this machine. Tests put another one in its place."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_SECONDS = 60.0  # importing torch from a cold network disk takes long

# Torch is imported in a process of its own, which may hang in the driver or die without harm.
_ASK_TORCH = """
import json, torch
found = {"cuda": torch.version.cuda, "gpus": [], "nccl": None}
if torch.cuda.is_available():
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["gpus"] = [[one.name, one.total_memory / 2**30] for one in properties]
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""
_ASK_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class Machine:
    """This one. Nothing heavy is imported into this process, and nothing raises for what is not there."""

    def python(self) -> tuple[int, int, int]:
        """The version of the Python that runs this."""
        return sys.version_info[:3]

    def version(self, package: str) -> str | None:
        """The version of an installed distribution."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def module(self, name: str) -> Path | None:
        """Where a top-level module lies, without importing it."""
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ()) or [spec.origin or "."]
        return Path(places[0])

    def program(self, name: str) -> str | None:
        """Where a program of the search path lies."""
        return shutil.which(name)

    def output(self, *command: str) -> str | None:
        """The first line that a command prints; None where it is not there, fails or hangs."""
        done = _run(command)
        return None if done is None else next(iter(done.strip().splitlines()), "")

    def torch(self) -> dict[str, Any]:
        """`cuda` (the version it was built for, or None), `gpus` ([name, GiB] each), `nccl`; `error` where it fails."""
        if (self.version("torch") or "").endswith("+cpu"):
            return {"cuda": None, "gpus": [], "nccl": None}
        return _json((sys.executable, "-c", _ASK_TORCH))

    def versions_of(self, python: str, packages: Sequence[str]) -> dict[str, Any]:
        """Versions in another Python environment (None: not installed); `error` where that Python cannot be run."""
        return _json((python, "-c", _ASK_VERSIONS, *packages))


@cache
def _run(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _json(command: tuple[str, ...]) -> dict[str, Any]:
    printed = _run(command)
    if printed is None:
        return {"error": f"{command[0]} is not there, fails, or takes longer than {_SECONDS:g} s"}
    try:
        return json.loads(printed.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"{command[0]} prints what it was not asked for"}
