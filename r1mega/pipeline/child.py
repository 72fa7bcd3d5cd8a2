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


class Child:
    """A command that runs, its output added to `log`, until `check` has said how it ended.

    Whatever ends this process ends the child with all it started, and so does a limit of `minutes`. On SIGUSR1 `ask`
    is called, which asks the child for a checkpoint; without it the child is ended. `keep_open` are descriptors that
    stay open as long as the child's leash lives: locks.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        minutes: float | None,
        signals: Signals,
        ask: Callable[[str], None] | None = None,
        keep_open: Sequence[int] = (),
    ) -> None:
        self._signals, self._ask, self._asked_at = signals, ask, -1.0
        self._told: Ended | None = None
        self.since = time.monotonic()
        self._minutes, self._until = minutes, self.since + 60 * minutes if minutes is not None else float("inf")
        library = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (library, os.environ.get("PYTHONPATH", "")) if part)
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "R1MEGA_LAUNCHER": str(os.getpid())}
        env.pop("R1MEGA_GRACE", None)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=env,
                process_group=0,
                pass_fds=tuple(keep_open),
            )

    def check(self) -> Ended | None:
        """How it has ended; None while it runs. To be called again and again: what is to be told to it is told here."""
        status, now = self._process.poll(), time.monotonic()
        if self._told is not None:
            if status is None and now < self._until:
                return None
            self.close()
            return self._told
        if status is not None:
            if status == STOPPED:
                return Ended(STOPPED, "stopped as asked, after a checkpoint")
            return Ended(status if status >= 0 else 128 - status)
        if self._signals.ends:
            number = self._signals.ends[0]
            self._tell(Ended(128 + number, f"ended by {signal.Signals(number).name}"))
        elif self._signals.stops and self._ask is None:
            self._tell(Ended(STOPPED, "asked to stop"))
        elif now > self._until:
            self._tell(Ended(124, f"took longer than its limit of {self._minutes:g} minutes"))
        elif self._signals.stops and self._ask is not None and now > self._asked_at + 1.0:
            self._asked_at = now  # again and again: a run that just starts forgets what was asked before
            self._ask("SIGUSR1")
        return None

    def close(self) -> None:
        """End what is left of it."""
        if self._process.poll() is None:
            self._process.terminate()  # the leash, which ends the whole group
        self._process.wait(timeout=GRACE_SECONDS)

    def _tell(self, ended: Ended) -> None:
        """Tell the program to end; the leash ends what is left after a while."""
        self._told, self._until = ended, time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(psutil.NoSuchProcess):
            for program in psutil.Process(self._process.pid).children():
                program.send_signal(signal.SIGTERM)
