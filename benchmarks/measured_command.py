"""A command with its wall time and the memory of all its processes. Imports no numeric library."""

from __future__ import annotations

import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.05


@dataclass(frozen=True)
class Measured:
    """What a command took. Memory is the largest sum over its processes that a sample every 50 ms has seen, in bytes.

    seconds: from before its first process starts until that has ended.
    cpu_seconds: of all its processes, in user and kernel; busy neighbours change it less than `seconds`.
    peak_rss: resident sizes; pages that two processes share, such as those of libraries, count twice.
    peak_uss: what the processes have for themselves.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_uss: int
    stdout: str


def run(command: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Run the command to its end; its stderr is this process's. Raises RuntimeError where it fails."""
    began, cpu_before = time.perf_counter(), _cpu_seconds_of_children()
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, text=True) as process:
        watch = _Watch(process.pid)
        try:
            watch.start()
            stdout, _ = process.communicate()
            seconds = time.perf_counter() - began
        except BaseException:
            watch.kill()
            raise
        finally:
            watch.end()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    # The first leaves out a process that was never waited for, the second what came after the last sample.
    cpu_seconds = max(_cpu_seconds_of_children() - cpu_before, watch.cpu_seconds())
    return Measured(seconds, cpu_seconds, watch.peak_rss, watch.peak_uss, stdout)


def high_water_bytes() -> int:
    """The largest resident size since this program was executed."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_through(folder: Path) -> int:
    """Read every file below the folder, so that it is in the page cache as far as it fits; returns their bytes."""
    total = 0
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total


class _Watch(threading.Thread):
    """Samples the memory of a process and of all that it started, until `end`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._cpu_seconds: dict[int, float] = {}
        self.peak_rss = self.peak_uss = 0

    def run(self) -> None:
        """Sample until told to end."""
        while not self._ended.wait(INTERVAL):
            self._sample()

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        if self.is_alive():
            self.join()

    def cpu_seconds(self) -> float:
        """What all processes had used when they were last seen."""
        return sum(self._cpu_seconds.values())

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _sample(self) -> None:
        rss = uss = 0
        for process in self._processes():
            try:
                memory, times = process.memory_full_info(), process.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                continue
            self._cpu_seconds[process.pid] = times.user + times.system
            rss, uss = rss + memory.rss, uss + memory.uss
        self.peak_rss, self.peak_uss = max(self.peak_rss, rss), max(self.peak_uss, uss)
