"""One stage's process: started behind a leash, watched, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from r1mega.launch import leash
from r1mega.loop.stop import STOPPED

POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0  # that a stage has to end after it is told; r1mega train takes up to 10


@dataclass
class Signals:
    """What the pipeline was told: `ends` SIGINT or SIGTERM, `stops` SIGUSR1, which asks for a checkpoint first."""

    ends: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """While this lasts they end nothing by themselves; outside the main thread nothing is collected."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: FrameType | None) -> None:
            (self.stops if number == signal.SIGUSR1 else self.ends).append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code as a shell has it, and why it was ended, where it was."""

    code: int
    why: str = ""


def run(
    command: Sequence[str],
    log: Path,
    *,
    minutes: float | None,
    signals: Signals,
    ask: Callable[[str], None] | None = None,
    tick: Callable[[], None] = lambda: None,
    keep_open: Sequence[int] = (),
) -> Ended:
    """Run a command to its end, its output added to `log`.

    Whatever ends this process ends the child with all it started, and so does a limit of `minutes`. On SIGUSR1 `ask`
    is called, which asks the child for a checkpoint; without it the child is ended. `keep_open` are descriptors that
    stay open as long as the child's leash lives: locks.
    """
    library = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (library, os.environ.get("PYTHONPATH", "")) if part)
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "R1MEGA_LAUNCHER": str(os.getpid())}
    env.pop("R1MEGA_GRACE", None)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-I", leash.__file__, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=env,
            process_group=0,
            pass_fds=tuple(keep_open),
        )
    try:
        return _watch(process, minutes, signals, ask, tick)
    finally:
        if process.poll() is None:
            process.terminate()  # the leash, which ends the whole group
        process.wait(timeout=GRACE_SECONDS)


def _watch(
    process: subprocess.Popen[bytes],
    minutes: float | None,
    signals: Signals,
    ask: Callable[[str], None] | None,
    tick: Callable[[], None],
) -> Ended:
    asked_at, began = -1.0, time.monotonic()
    while process.poll() is None:
        if signals.ends:
            _tell(process, signal.SIGTERM)
            return Ended(128 + signals.ends[0], f"ended by {signal.Signals(signals.ends[0]).name}")
        if signals.stops and ask is None:
            _tell(process, signal.SIGTERM)
            return Ended(STOPPED, "asked to stop")
        if signals.stops and ask is not None and time.monotonic() > asked_at + 1.0:
            asked_at = time.monotonic()  # again and again: a run that just starts forgets what was asked before
            ask("SIGUSR1")
        if minutes is not None and time.monotonic() > began + 60 * minutes:
            _tell(process, signal.SIGTERM)
            return Ended(124, f"took longer than its limit of {minutes:g} minutes")
        tick()
        time.sleep(POLL_SECONDS)
    status = process.returncode
    if status == STOPPED:
        return Ended(STOPPED, "stopped as asked, after a checkpoint")
    return Ended(status if status >= 0 else 128 - status)


def _tell(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Tell the program to end, and wait; the leash ends what is left."""
    _signal(process, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for program in psutil.Process(process.pid).children():
            program.send_signal(number)
