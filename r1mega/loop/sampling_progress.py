"""What a person sees of samples being drawn while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from r1mega.benchmark.samples import Graded, SampleFile

_BAR_SECONDS, _LINE_SECONDS = 0.5, 10.0


class Progress:
    """Counts the samples in a file, those of earlier starts included. Nothing is shown where `is_on` is false.

    `share` is what one sample counts, of which the mean is shown.
    """

    def __init__(
        self, name: str, total: int, file: SampleFile, *, is_on: bool, share: Callable[[Graded], float]
    ) -> None:
        self._name, self._total, self._file, self._share = name, total, file, share
        self._lock = threading.Lock()
        self._first, self._start, self._shown = len(file.samples), time.monotonic(), 0.0
        self._is_on, self._bar = is_on, None
        if self._is_on and self._first:
            print(f"{self._name}: goes on with {self._first} of {total} samples kept", flush=True)
        if self._is_on and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, TimeRemainingColumn())
            self._task = self._bar.add_task(self._name, total=total, completed=self._first)
            self._bar.start()

    def moved(self) -> None:
        """A sample has come."""
        with self._lock:
            now = time.monotonic()
            if now - self._shown < (_BAR_SECONDS if self._bar is not None else _LINE_SECONDS):
                return
            self._shown = now
            if self._bar is not None:
                self._bar.update(self._task, completed=len(self._file.samples), description=self._words())
            elif self._is_on:
                self._print(now)

    def close(self) -> None:
        """Show the last state and give the terminal back."""
        if self._bar is not None:
            self._bar.update(self._task, completed=len(self._file.samples), description=self._words())
            self._bar.stop()
        elif self._is_on:
            self._print(time.monotonic())

    def _words(self) -> str:
        samples = list(self._file.samples.values())
        mean = sum(map(self._share, samples)) / max(1, len(samples))
        return f"{self._name} so far {100 * mean:.1f}%"

    def _print(self, now: float) -> None:
        done, seconds = len(self._file.samples), now - self._start
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 and done < self._total else ""
        print(f"{self._words()} | {done}/{self._total} samples | {seconds:.0f} s{left}", flush=True)
