"""One SGLang server as the launcher sees it: a process on each of its nodes, started, judged and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1mega.launch import leash
from r1mega.launch.supervise import signal_name

_PORT_TAKEN, _LOG_END = b"address already in use", 4096
BEAT_SECONDS = 5.0  # far_leash.py waits for a minute
FAR_END_SECONDS = 15.0  # that a process elsewhere, told to end, is waited for


@dataclass(frozen=True)
class Limits:
    """Until a server first answers; between two answers; how often it is started again."""

    startup_seconds: float
    hang_seconds: float
    restarts: int


@dataclass
class NodeProcess:
    """What runs on one node.

    Args:
        command: the arguments to start it with, asked for anew at each start.
        is_far: the command starts it on another machine, by far_leash.py.
    """

    command: Callable[[], Sequence[str]]
    env: Mapping[str, str]
    log: Path
    is_far: bool = False
    process: subprocess.Popen[bytes] | None = None
    log_start: int = 0  # where this start begins in the log
    beaten: float = 0.0

    def start(self) -> None:
        """Start the process in a group of its own; its output is added to the log."""
        grace = {"R1MEGA_GRACE": str(FAR_END_SECONDS)} if self.is_far else {}
        with self.log.open("ab") as file:
            self.log_start = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, *self.command()],
                env={**os.environ, **self.env, **grace, "R1MEGA_LAUNCHER": str(os.getpid())},
                stdin=subprocess.PIPE if self.is_far else subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,
            )
        if self.process.stdin is not None:
            os.set_blocking(self.process.stdin.fileno(), False)

    def beat(self, now: float) -> None:
        """Tell a process elsewhere that the launcher lives."""
        if self.process is None or self.process.stdin is None or now < self.beaten + BEAT_SECONDS:
            return
        self.beaten = now
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it has ended, as is seen soon; it reads nothing
            os.write(self.process.stdin.fileno(), b".")

    def fault(self) -> str | None:
        """How it ended, if it did."""
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return None
        return f"ended with exit code {status}" if status >= 0 else f"was killed by {signal_name(-status)}"

    def found_port_taken(self) -> bool:
        """Whether the log's end says so. SGLang 0.5.21 then neither serves nor ends."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - _LOG_END))
            return _PORT_TAKEN in file.read()

    def tell_to_end(self) -> None:
        """A process elsewhere begins to end. Harmless when repeated."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def end(self, deadline: float) -> None:
        """End it and all it started; what is elsewhere has until then to say that it has. Harmless when repeated."""
        if self.process is None:
            return
        self.tell_to_end()
        if self.is_far:
            with contextlib.suppress(subprocess.TimeoutExpired):  # out of reach: it ends when it hears nothing more
                self.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left, or on macOS none but ended ones
            os.killpg(self.process.pid, signal.SIGKILL)  # it has nothing to save, and takes 5 s for a SIGTERM
        self.process.wait()


@dataclass
class EngineProcess:
    """One server: its processes, and when it last answered. Times are of time.monotonic().

    Args:
        url: where its first node answers.
        nodes: one of each node it runs on.
        questions: paths that it answers where it is well; SGLang's second asks the process that generates.
    """

    name: str
    url: str
    nodes: Sequence[NodeProcess]
    limits: Limits
    questions: tuple[str, ...] = ("/health", "/server_info")
    started: float = 0.0
    answered: float | None = None  # since this start
    starts: int = 0
    history: list[str] = field(default_factory=list)  # why it was started again
    due: str | None = None  # why it has to be, when its turn comes
    culprit: NodeProcess = field(init=False)  # the one whose log tells most of the last fault

    def __post_init__(self) -> None:
        assert self.nodes, "a server runs somewhere"
        self.culprit = self.nodes[0]

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process of its first node."""
        return self.nodes[0].process

    @property
    def log(self) -> Path:
        """The log of its first node."""
        return self.nodes[0].log

    def start(self) -> None:
        """Start it on all its nodes."""
        for node in self.nodes:
            node.start()
        self.started, self.answered = time.monotonic(), None
        self.starts += 1

    def fault(self, now: float) -> str | None:
        """What is wrong with it now, if anything."""
        for rank, node in enumerate(self.nodes):
            where = f"on node {rank} " if len(self.nodes) > 1 else ""
            how = node.fault()
            if how is None and self.answered is None and node.found_port_taken():
                self.culprit = node
                return f"{where}found its port taken"
            if how is not None:
                self.culprit = node
                return f"{where}{how}" if self.answered else f"{where}{how} before it first answered"
        self.culprit = self.nodes[0]
        if self.answered is None:
            waited = now - self.started
            late = waited > self.limits.startup_seconds
            return f"has not answered {waited:.0f} s after its start (sglang.startup_seconds)" if late else None
        silent, limit = now - self.answered, self.limits.hang_seconds
        return f"has not answered for {silent:.0f} s (sglang.hang_seconds)" if silent > limit else None

    def beat(self) -> None:
        """Tell its processes elsewhere that the launcher lives."""
        for node in self.nodes:
            node.beat(time.monotonic())

    def end(self) -> None:
        """End it on all its nodes. Harmless when repeated."""
        for node in self.nodes:
            node.tell_to_end()
        deadline = time.monotonic() + FAR_END_SECONDS
        for node in self.nodes:
            node.end(deadline)
