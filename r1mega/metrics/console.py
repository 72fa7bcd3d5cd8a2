"""What a person sees of a run: one live display on a terminal, one plain line per update elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from r1mega.metrics.catalog import CATALOG, TIME_PREFIX, format_seconds, format_value
from r1mega.metrics.dashboard import RunState, render

REFRESH_PER_SECOND = 2  # each refresh takes a few milliseconds of a core that may also be training


class Console:
    """Shows the progress of a run, of RL and SFT alike: only what is reported is shown.

    On a terminal there is one live display; messages scroll by above it. Where `file` is no terminal (a log, a pipe)
    each update is one line without control codes. With `enabled` False nothing is written (ranks other than the first).

    Args:
        title: the name of the run.
        total_updates: optimizer steps of the whole run.
        enabled: whether anything is written.
        file: where to write; None is standard output.
        details: shown under the title, such as model, layout, device and seed.
        start_update: updates already done when a run is resumed; they do not count towards the time per update.
        clock: seconds, for the time passed and the time left.
    """

    def __init__(
        self,
        title: str,
        total_updates: int,
        enabled: bool = True,
        file: TextIO | None = None,
        *,
        details: Mapping[str, str] | None = None,
        start_update: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file if file is not None else sys.stdout
        self._lock = threading.Lock()
        self._state = RunState(title, dict(details or {}), total_updates, start_update, clock)
        self._rich = RichConsole(file=self._file)
        self._live: Live | None = None
        self._plain = False
        if enabled:
            self._open()

    def _open(self) -> None:
        # isatty is asked as well: rich takes FORCE_COLOR for a terminal, and a log file would fill with control codes.
        if self._file.isatty() and self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=self._rich, refresh_per_second=REFRESH_PER_SECOND)
            self._live.start()
            return
        self._plain = True
        facts = [f"{name} {value}" for name, value in self._state.details.items()]
        self._print_plain(" | ".join([self._state.title, *facts, f"{self._state.total_updates} updates"]))

    def update(
        self, update: int, round: int, metrics: Mapping[str, float], phases: Mapping[str, float] | None = None
    ) -> None:
        """Report the metrics of one update; `update` counts those done, from 1 (0 for what is measured before them).

        Metrics not given keep their last value on the live display. `phases` are the seconds of each phase of the
        round; None keeps the last ones, or takes them from `time/` metrics where there are any.
        """
        values = {name: float(value) for name, value in metrics.items()}
        timed = {
            name.removeprefix(TIME_PREFIX): value for name, value in values.items() if name.startswith(TIME_PREFIX)
        }
        seconds = dict(phases) if phases is not None else timed
        with self._lock:
            self._state.record(update, round, values, seconds)
            line = self._plain_line(values, seconds) if self._plain else None
        if line is not None:
            self._print_plain(line)

    def phase(self, name: str | None) -> None:
        """Show that the run has entered phase `name`; None when no phase is running."""
        with self._lock:
            self._state.enter_phase(name)

    def message(self, text: str) -> None:
        """Write one message: above the live display, or as a line of its own."""
        if self._live is not None:
            self._rich.print(Text(text))
        elif self._plain:
            self._print_plain(text)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back. Further calls do nothing."""
        with self._lock:
            self._state.enter_phase(None)
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
        self._plain = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _render(self) -> object:
        # Called from rich's refresh thread, while the training thread may be reporting.
        with self._lock:
            width, height = self._rich.size
            return render(self._state, width, height, ascii_only=not self._rich.encoding.startswith("utf"))

    def _plain_line(self, values: Mapping[str, float], seconds: Mapping[str, float]) -> str:
        state = self._state
        parts = [f"update {state.update}/{state.total_updates} round {state.round}"]
        shown = [f"{CATALOG[name].short} {format_value(name, values[name])}" for name in CATALOG if name in values]
        parts.append(" ".join(shown))
        parts.append(" ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items()))
        left = state.seconds_left()
        eta = f" eta {format_seconds(left)}" if left else ""
        parts.append(f"{format_seconds(state.elapsed())}{eta}")
        return " | ".join(part for part in parts if part)

    def _print_plain(self, line: str) -> None:
        # A log in an encoding that lacks a character of a message must not end the run.
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._file.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._file.flush()
