"""What a person sees of a pipeline: one live table on a terminal, one line for each change elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.box import ASCII, ROUNDED
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from r1mega.metrics.catalog import format_seconds
from r1mega.pipeline.judge import Need
from r1mega.pipeline.runner import Walk
from r1mega.pipeline.stage import Stage

_STYLES = {Need.nothing: "green", Need.wait: "bright_black", Need.go_on: "yellow", Need.again: "yellow"}
_TAIL_BYTES = 1 << 14
_SECONDS = 0.5  # between two looks at the files of a running stage


class Display:
    """Shows a walk. Off a terminal a line is printed when a stage begins, ends or is found done."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdout
        self._console = Console(file=self._file, highlight=False)
        self._live: Live | None = None
        self._said: dict[str, str] = {}
        self._looked = 0.0

    @contextmanager
    def open(self) -> Iterator[None]:
        """While this lasts a terminal shows the live table, whose last state stays."""
        if not (self._file.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal):
            yield
            return
        with Live(console=self._console, auto_refresh=False) as self._live:
            yield
        self._live = None

    def __call__(self, walk: Walk) -> None:
        """Show what has changed."""
        if self._live is not None:
            now = time.monotonic()
            if not walk.running or now > self._looked + _SECONDS:
                self._looked = now
                self._live.update(table(walk), refresh=True)
            return
        seed = next(iter(walk.stages.values())).place.seed
        for name in walk.verdicts:
            state = _state(walk, name)[0]
            if self._said.get(f"{seed} {name}") == state:
                continue
            if state == Need.wait or (state in (Need.begin, Need.again, Need.go_on) and name not in walk.running):
                continue
            self._said[f"{seed} {name}"] = state
            print(f"{name}: {' '.join(part for part in _state(walk, name) if part)}", file=self._file, flush=True)

    def status(self, walk: Walk) -> None:
        """Print the table once."""
        self._console.print(table(walk, ascii_only=not self._file.isatty()))


def table(walk: Walk, *, ascii_only: bool = False) -> Table:
    """The stages with their states."""
    made = Table(box=ASCII if ascii_only else ROUNDED, title=walk.pipeline.title or None)
    for name in ("stage", "runs", "state", "time", "what"):
        made.add_column(name, justify="right" if name == "time" else "left", overflow="fold")
    for name, stage in walk.stages.items():
        state, seconds, what = _state(walk, name)
        verdict = walk.verdicts.get(name)
        style = "cyan" if name in walk.running else "red" if name in walk.failed else ""
        style = style or (_STYLES.get(verdict.need, "") if verdict else "")
        runs = stage.spec.experiment or stage.spec.tool or ""
        shown = Text(state, style=style)
        made.add_row(name, Text(f"{stage.spec.run} {runs}".strip()), shown, seconds, Text(what))
    return made


def _state(walk: Walk, name: str) -> tuple[str, str, str]:
    """State, time and a remark."""
    stage, verdict = walk.stages[name], walk.verdicts.get(name)
    if name in walk.running:
        return "running", format_seconds(walk.running[name].seconds), _progress(stage)
    if name in walk.failed:
        return "failed", "", "see its log"
    if verdict is None:
        return "", "", stage.spec.about
    if name in walk.elsewhere and verdict.manifest is not None and verdict.manifest["status"] == "running":
        return "running", "", _progress(stage)
    if verdict.need is Need.nothing and verdict.manifest is not None:
        counts = ", ".join(f"{key} {value:,}" for key, value in verdict.manifest["counts"].items())
        return str(verdict.need), format_seconds(verdict.manifest["seconds"]), counts
    return str(verdict.need), "", verdict.why


def _progress(stage: Stage) -> str:
    """The newest update of a training, or the number of samples of an evaluation."""
    for file, unit in (("metrics.jsonl", "update"), ("samples.jsonl", "")):
        path = stage.dir / file
        if not path.exists():
            continue
        with path.open("rb") as lines:
            lines.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            whole = lines.read().split(b"\n")[:-1]
        if not unit:
            return "samples come"
        try:
            return f"{unit} {json.loads(whole[-1])[unit]}" if whole else ""
        except (ValueError, KeyError):
            return ""
    return stage.spec.about
