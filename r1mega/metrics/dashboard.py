"""The live display: the state of a run, and how it is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.box import ASCII, ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r1mega.metrics.catalog import CATALOG, PHASES, format_seconds, format_value
from r1mega.metrics.sparkline import ASCII_BLOCKS, BLOCKS, sparkline

PHASE_STYLES = dict(zip(PHASES, ("cyan", "green", "yellow", "magenta", "blue", "bright_black"), strict=True))
OTHER_PHASE_STYLE = "white"
MAX_WIDTH = 120  # wider terminals gain nothing from longer bars
BAR_MIN, PHASE_BAR_MAX, PROGRESS_BAR_MAX = 8, 24, 40
BESIDE_WIDTH = (
    70  # inner columns from which the phases, with bars of BAR_MIN, fit beside the metrics and not under them
)
SPARK_MAX = 60
PHASE_ROOM = 16  # columns kept free for the name and seconds of the running phase
# Reward and response length are what an RL run is watched for; an SFT run reports neither and shows its loss.
SPARKS_RL = ("reward/mean", "eval/pass_at_1", "rollout/response_tokens")
SPARKS_OTHER = ("train/loss",)


@dataclass
class RunState:
    """What has been reported so far. `history` holds every value of a metric, in order of report."""

    title: str
    details: dict[str, str]
    total_updates: int
    start_update: int = 0
    clock: Callable[[], float] = time.monotonic
    update: int = field(init=False)
    round: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    phase: str | None = None
    phase_start: float = 0.0
    start: float = field(init=False)
    last_report: float = field(init=False)

    def __post_init__(self) -> None:
        self.update = self.start_update
        self.start = self.last_report = self.clock()

    def record(self, update: int, round: int, values: Mapping[str, float], phases: Mapping[str, float]) -> None:
        """Take in one report."""
        self.update, self.round, self.last_report = update, round, self.clock()
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        if phases:
            self.phases = dict(phases)

    def enter_phase(self, name: str | None) -> None:
        """Note which phase is running since when."""
        self.phase, self.phase_start = name, self.clock()

    def elapsed(self) -> float:
        """Seconds since the display was opened."""
        return self.clock() - self.start

    def seconds_left(self) -> float | None:
        """Time left at the mean speed so far; None before the first update."""
        done = self.update - self.start_update
        if done <= 0:
            return None
        rate = (self.last_report - self.start) / done
        expected = rate * (self.total_updates - self.update)
        return max(0.0, expected - (self.clock() - self.last_report))


def render(state: RunState, width: int, height: int, ascii_only: bool = False) -> RenderableType:
    """The whole display for a terminal of `width` x `height`; `ascii_only` where its encoding has no block characters.

    Where the terminal is too low, the metrics that stand last in the catalog are left out.
    """
    inner = min(width, MAX_WIDTH) - 4
    sparks = _sparks(state, inner, ascii_only)
    used = 4 + (sparks.row_count + 1 if sparks.row_count else 0)  # two border lines, header, progress
    beside = inner >= BESIDE_WIDTH
    under = 0 if beside or not state.phases else len(state.phases) + 1
    metrics = _metric_table(state, max_rows=height - used - under - 3)  # blank line, table head, last line kept free
    parts: list[RenderableType] = [_header(state), _progress(state, inner)]
    if sparks.row_count:
        parts += [Text(), sparks]
    if metrics.row_count or state.phases:
        phases = _phase_table(state, inner, ascii_only)
        body = Table.grid(padding=(0, 4))
        if beside:
            body.add_row(metrics, phases)
        else:
            body.add_row(metrics)
            body.add_row(phases)
        parts += [Text(), body]
    return Panel(
        Group(*parts),
        title=Text(f" {state.title} ", style="bold"),
        box=ASCII if ascii_only else ROUNDED,
        border_style="bright_black",
        width=min(width, MAX_WIDTH),
    )


def _header(state: RunState) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for index, (name, value) in enumerate(state.details.items()):
        text.append("   " if index else "").append(f"{name} ", style="bright_black").append(value)
    return text


def _progress(state: RunState, inner: int) -> Table:
    table = Table.grid(padding=(0, 2))
    left = state.seconds_left()
    count = Text(f"update {state.update}/{state.total_updates}", style="bold", no_wrap=True)
    count.append(f"  round {state.round}", style="not bold")
    clock = f"{format_seconds(state.elapsed())} passed" + (f", {format_seconds(left)} left" if left else "")
    now = Text(no_wrap=True)
    if state.phase is not None:
        seconds = format_seconds(state.clock() - state.phase_start)
        now.append(f"{state.phase} {seconds}", style=PHASE_STYLES.get(state.phase, OTHER_PHASE_STYLE))
    cells: list[RenderableType] = [count, Text(clock, no_wrap=True), now]
    bar = min(PROGRESS_BAR_MAX, inner - len(count) - len(clock) - PHASE_ROOM - 6)
    if bar >= BAR_MIN:
        total = max(state.total_updates, 1)
        cells.insert(1, ProgressBar(total=total, completed=min(state.update, total), width=bar))
    table.add_row(*cells)
    return table


def _metric_table(state: RunState, max_rows: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bright_black")
    table.add_column("metric", no_wrap=True)
    table.add_column("first", justify="right", style="bright_black", no_wrap=True)
    table.add_column("now", justify="right", style="bold", no_wrap=True)
    shown = [name for name in CATALOG if state.history.get(name)]
    for name in shown[: max(max_rows, 1)]:
        values = state.history[name]
        table.add_row(CATALOG[name].label, format_value(name, values[0]), format_value(name, values[-1]))
    return table


def _phase_table(state: RunState, inner: int, ascii_only: bool) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bright_black")
    total = sum(state.phases.values())
    table.add_column("phase", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column(f"share of {format_seconds(total)}", no_wrap=True)
    longest = max(state.phases.values(), default=0.0)
    width = min(PHASE_BAR_MAX, max(0, inner - BESIDE_WIDTH) + BAR_MIN)
    for name, seconds in state.phases.items():
        style = PHASE_STYLES.get(name, OTHER_PHASE_STYLE)
        filled = round(width * seconds / longest) if longest > 0 else 0
        bar = Text(("#" if ascii_only else "━") * filled, style=style)
        share = f" {100 * seconds / total:.0f}%" if total > 0 else ""
        running = "bold " + style if name == state.phase else style
        table.add_row(Text(name, style=running), format_seconds(seconds), bar.append(share, style="bright_black"))
    return table


def _sparks(state: RunState, inner: int, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    rl = [name for name in SPARKS_RL if name in state.history]
    for name in rl or [name for name in SPARKS_OTHER if name in state.history]:
        values = state.history[name]
        line = sparkline(values, min(SPARK_MAX, max(BAR_MIN, inner - 40)), ASCII_BLOCKS if ascii_only else BLOCKS)
        ends = f"{format_value(name, values[0])} to {format_value(name, values[-1])}"
        table.add_row(CATALOG[name].label, Text(line, style="cyan"), Text(ends, style="bright_black"))
    return table
