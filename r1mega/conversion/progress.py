"""How far a conversion is: a bar with bytes, rate and remaining time, or a line now and then where nobody looks."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 10.0


class Bar:
    """A context in which `update` shows progress on stderr."""

    def __init__(self, what: str = "converting") -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, auto_refresh=False,
        )  # fmt: skip
        self._task = self._progress.add_task(what, total=None)
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """Show that so many bytes of so many are read."""
        self._progress.update(self._task, completed=done, total=total)
        self._progress.refresh()  # by hand: a process that forks should have no threads
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < _LINE_SECONDS:
            return
        self._said = now
        rate = done / max(now - self._began, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if rate else ""
        amount = f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB"
        print(f"{self._what}: {amount}, {rate / 1e6:,.0f} MB/s{left}", file=sys.stderr)
