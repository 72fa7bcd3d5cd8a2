"""A run that is asked to stop: at its next boundary it takes a checkpoint and ends with an exit code that says so.

The question is a file in the run directory. Whoever is told that the time is up writes it: the launcher, or what stands
around each rank of a Slurm job. Rank 0 looks for it where a checkpoint could be due, so that all ranks agree on where.
"""

from __future__ import annotations

import os
from pathlib import Path

STOP_FILE = "stop"
# Of a process that has stopped so; EX_TEMPFAIL of sysexits.h: not a failure, to be tried again.
STOPPED = 75


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint is written. The message says who asked."""


def ask(run_dir: Path | str, why: str) -> None:
    """Ask the run in this directory to stop. Harmless when repeated; safe in a signal handler."""
    path = Path(run_dir) / STOP_FILE
    part = path.with_name(f"{STOP_FILE}.{os.getpid()}.part")
    part.write_text(why, encoding="utf-8")
    part.replace(path)


def withdraw(run_dir: Path | str) -> None:
    """Forget what was asked of an earlier start of the run."""
    (Path(run_dir) / STOP_FILE).unlink(missing_ok=True)


def asked(run_dir: Path | str) -> str | None:
    """Who has asked the run to stop, if anyone did."""
    try:
        return (Path(run_dir) / STOP_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
