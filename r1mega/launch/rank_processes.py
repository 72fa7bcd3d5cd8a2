"""The processes of the ranks on this machine: each started for itself, or all forked from one that has imported torch.

Every rank leads its own process group, so the terminal's Ctrl-C reaches only the launcher and a rank's own children end
with it. On Linux the kernel kills the ranks should the launcher itself be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from r1mega.loop.stop import STOPPED
from r1mega.parallel import fork

POLL_SECONDS = 0.05
CAN_FORK = sys.platform == "linux"  # elsewhere nobody can adopt the forks
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


@dataclass
class EndedRank:
    """How one rank ended, and where it wrote. `status` is as Popen.returncode; None while it runs. `node` is its
    machine, where there are several."""

    rank: int
    status: int | None
    log: Path
    node: str | None = field(default=None, kw_only=True)

    @property
    def has_failed(self) -> bool:
        """Whether it ended, and neither well nor as it was asked to."""
        return self.status not in (None, 0, STOPPED)


class Process(Protocol):
    """A child of this process, as subprocess.Popen is one."""

    pid: int
    returncode: int | None

    def wait(self) -> int:
        """Wait for its end and reap it."""


@dataclass
class Rank(EndedRank):
    """A rank on this machine; it has to be reaped."""

    process: Process


@dataclass
class _Adopted:
    """A child that another process forked."""

    pid: int
    returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class NoRanksError(Exception):
    """The process that was to divide into ranks ended before it did; `status` as Popen.returncode."""

    def __init__(self, status: int, log: Path) -> None:
        super().__init__(status, log)
        self.status, self.log = status, log


def start_each(argv: Sequence[str], world_size: int, log_dir: Path, env: Mapping[str, str]) -> Iterator[Rank]:
    """Start `argv` once per rank, with this process's environment, `env` and the rank's numbers."""
    for rank in range(world_size):
        log = log_dir / f"rank{rank}.log"
        with log.open("wb") as file:
            numbers = fork.numbers(rank, world_size)
            process = _popen(argv, {**env, **numbers}, None if rank == 0 else file, file)
        yield Rank(rank, None, log, process)


def start_forked(
    argv: Sequence[str], world_size: int, log_dir: Path, env: Mapping[str, str], is_over: Callable[[], bool]
) -> list[Rank]:
    """Start `argv` once; it calls `parallel.fork.divide`. No ranks where `is_over` says so before they are there.

    What it says until then goes to the log of rank 0. Raises NoRanksError where it ends without dividing.
    """
    logs = [log_dir / f"rank{rank}.log" for rank in range(world_size)]
    for log in logs:
        log.write_bytes(b"")
    report, write_end = os.pipe()
    order = {"launcher": os.getpid(), "report": write_end, "log_dir": str(log_dir), "world_size": world_size}
    with _adopting_orphans(), os.fdopen(report, "rb") as answers, logs[0].open("ab") as file:
        try:
            process = _popen(argv, {**env, fork.ORDER: json.dumps(order)}, None, file, pass_fds=(write_end,))
        finally:
            os.close(write_end)
        while not is_over() and not select.select([answers], [], [], POLL_SECONDS)[0]:
            pass
        if is_over():
            process.kill()
        # Nothing, or all of them, as they are written at once. To its end: by then all are adopted.
        pids = json.loads(answers.read() or "[]")
        status = process.wait()
    if not pids and not is_over():
        raise NoRanksError(status, logs[0])
    return [Rank(rank, None, logs[rank], _Adopted(pid)) for rank, pid in enumerate(pids)]


def _popen(
    argv: Sequence[str], env: Mapping[str, str], stdout, stderr, pass_fds: Sequence[int] = ()
) -> subprocess.Popen:
    return subprocess.Popen(
        argv,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        pass_fds=pass_fds,
        preexec_fn=die_with_parent(os.getpid()) if sys.platform == "linux" else None,
    )


def die_with_parent(parent: int) -> Callable[[], None]:
    """For Popen's `preexec_fn`: the kernel kills the process when the thread of `parent` that starts it ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def set_death_signal() -> None:
        libc.prctl(fork.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the launcher died before the line above
            os._exit(1)

    return set_death_signal


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Whatever a child of this process leaves behind becomes this process's child meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) is refused")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
