"""A child process under a limit on time, output and the memory of all its descendants together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass

import psutil

_LOOK_SECONDS = 0.1
_CHUNK = 1 << 16
_GONE_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `returncode` is negative, or 128 and more, for a signal; `stopped` says which limit ended
    it, "" where it ended by itself."""

    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float
    stopped: str = ""


def watch(process: subprocess.Popen[bytes], stdin: bytes, *, seconds: float, output: int, memory: int) -> Outcome:
    """Feed `stdin`, gather what it writes, and kill it and its process group at the first limit it passes.

    `process` leads a process group of its own and has three pipes; `output` bounds stdout and stderr each, in bytes,
    `memory` the resident bytes of all descendants.
    """
    began = time.monotonic()
    streams = _Streams(process, stdin, output)
    stopped = ""
    look = began + _LOOK_SECONDS
    try:
        while not stopped and process.poll() is None:
            now = time.monotonic()
            streams.exchange(min(_LOOK_SECONDS, max(began + seconds - now, 0.0)))
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_SECONDS
                if _resident(process.pid) > memory:
                    stopped = f"more than {memory >> 20} MiB of memory"
            if streams.is_over:
                stopped = f"more than {output} bytes of output"
            elif now - began >= seconds and process.poll() is None:
                stopped = f"no end within {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = time.monotonic()
        # Whoever still holds the pipes is about to be killed by the kernel; what was written before is still there.
        streams.drain(ended + _GONE_SECONDS)
        streams.close()
    if not stopped and streams.is_over:
        stopped = f"more than {output} bytes of output"
    out, err = streams.written
    return Outcome(process.returncode, out, err, ended - began, stopped)


class _Streams:
    """The three pipes of a process, none of which may block the other two."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes, output: int) -> None:
        assert process.stdin and process.stdout and process.stderr, "the process has three pipes"
        self._in, self._pipes = process.stdin, (process.stdout, process.stderr)
        self._left, self._output = memoryview(stdin), output
        self._chunks: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._selector = selectors.DefaultSelector()
        for pipe in (self._in, *self._pipes):
            os.set_blocking(pipe.fileno(), False)
        for pipe, chunks in zip(self._pipes, self._chunks, strict=True):
            self._selector.register(pipe, selectors.EVENT_READ, chunks)
        if stdin:
            self._selector.register(self._in, selectors.EVENT_WRITE)
        else:
            self._in.close()

    @property
    def is_over(self) -> bool:
        """Whether a stream has held more than it may."""
        return any(len(chunks) > self._output for chunks in self._chunks)

    @property
    def written(self) -> tuple[bytes, bytes]:
        """stdout and stderr so far, up to the limit."""
        return bytes(self._chunks[0][: self._output]), bytes(self._chunks[1][: self._output])

    def exchange(self, seconds: float) -> bool:
        """Write and read what is ready within `seconds`; False when no pipe is left."""
        if not self._selector.get_map():
            time.sleep(min(seconds, 0.005))
            return False
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._in:
                self._write()
                continue
            chunk = os.read(key.fd, _CHUNK)
            if chunk:
                key.data.extend(chunk[: self._output + 1 - len(key.data)])
            else:
                self._selector.unregister(key.fileobj)
        return True

    def drain(self, deadline: float) -> None:
        """Read to the end of both streams, or to the deadline: an end means that nobody holds them any more."""
        if not self._in.closed:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._in)
        while time.monotonic() < deadline and self.exchange(0.05):
            pass

    def close(self) -> None:
        """Close the pipes."""
        self._selector.close()
        for pipe in (self._in, *self._pipes):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _write(self) -> None:
        try:
            self._left = self._left[os.write(self._in.fileno(), self._left[:_CHUNK]) :]
        except BrokenPipeError:  # it does not read its input: its right
            self._left = self._left[:0]
        if not self._left:
            self._selector.unregister(self._in)
            self._in.close()


def _resident(pid: int) -> int:
    """Bytes resident of a process and all its descendants; pages they share count once for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
    return total
