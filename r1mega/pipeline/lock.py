"""One pipeline in a directory: locks that the kernel takes back from whoever is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.faults import ConfigError, Fault

LOCK_FILE = "lock"
# The leash of a killed pipeline's stage holds its lock until the stage has ended.
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.05


@contextlib.contextmanager
def held(directory: Path, *, shared: bool = False) -> Iterator[int]:
    """Hold the directory's lock; `shared` lets others hold it so too. Gives the descriptor that holds it.

    Raises ConfigError where somebody else holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, directory)
        if not shared:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether somebody has the directory's lock to himself at this moment. Nothing is written."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, how: int, directory: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "another one"
                constraint = f"a pipeline runs in it (process {owner})"
                remedy = "wait for it or end it; pipeline.status=true only looks"
                raise ConfigError([Fault("run.dir", str(directory), constraint, remedy)]) from None
        time.sleep(_POLL_SECONDS)
