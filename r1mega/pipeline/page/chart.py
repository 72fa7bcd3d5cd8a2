"""One chart as inline SVG: lines over updates, thin for each seed, thick for their mean, and its figures as a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1mega.pipeline.page.input import ALL, Points
from r1mega.pipeline.page.markup import Child, Element, details, el, table
from r1mega.pipeline.page.text import Unit, figure, label, listed, unit_of, written

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 66, 16, 44
COLORS = 4  # classes c0..c3 of the style sheet
MOST_DRAWN, MOST_ROWS, MOST_DOTS, MOST_TIPS = 1000, 200, 16, 200
SMOOTH_FROM = 80  # points; a line of more is drawn pale, and its moving mean over it
_LABEL_GAP = 18
_NEAR_ZERO = 0.2  # share of the largest value that others must span for an axis to begin at zero all the same
Known = list[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """One metric of one stage, by seed."""

    name: str
    by_seed: Mapping[str, Points]
    label: str = ""  # of the legend; "": that of the metric

    def said(self) -> str:
        return self.label or label(self.name)

    @functools.cached_property
    def mean(self) -> Known:
        """(update, mean over the seeds) at each update at which every seed has a value."""
        columns = [dict(points) for points in self.by_seed.values() if points]
        if not columns:
            return []
        shared = [update for update in columns[0] if all(column.get(update) is not None for column in columns)]
        return [(u, math.fsum(column[u] or 0.0 for column in columns) / len(columns)) for u in sorted(shared)]

    def updates(self) -> list[int]:
        return [update for points in self.by_seed.values() for update, value in points if value is not None]

    def values(self) -> list[float]:
        return [value for points in self.by_seed.values() for _, value in points if value is not None]


@dataclass(frozen=True)
class Scale:
    """Data to pixels: `updates` and `values` are (lowest, highest) of the axes."""

    updates: tuple[int, int]
    values: tuple[float, float]

    def x(self, update: float) -> float:
        first, last = self.updates
        return LEFT + (update - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def value_range(values: Sequence[float], *, from_zero: bool = True) -> tuple[float, float]:
    """Round numbers around all values and zero; without `from_zero`, zero only where the values come near it."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if from_zero or high - low > _NEAR_ZERO * max(abs(low), abs(high)):
        low, high = min(0.0, low), max(0.0, high)
    step = _step(high - low or abs(high), 5)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return bottom, top if top > bottom else bottom + step


def chart(
    title: str,
    lines: Sequence[Line],
    unit: Unit,
    updates: tuple[int, int],
    values: tuple[float, float],
    *,
    is_small: bool = False,
) -> Element:
    """A figure element with the drawing, its legend and its figures; `updates` and `values`: the ends of the axes.

    A small one leaves out the figures, and what says them where it is pointed at.
    """
    scale = Scale(updates, values)
    inside = [*_axes(scale, unit), *_curves(lines, scale, unit, is_small=is_small)]
    said = f"{title}: {_said(lines, unit)}"
    drawn = el("svg", *inside, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said)
    caption = el("figcaption", el("b", title))
    if is_small:
        return el("figure", caption, drawn, _legend(lines), cls="chart")
    return el("figure", caption, drawn, _legend(lines), details("The figures", *figures(lines)), cls="chart")


def _said(lines: Sequence[Line], unit: Unit) -> str:
    parts = []
    for line in lines:
        if mean := line.mean:
            (first, start), (last, end) = mean[0], mean[-1]
            parts.append(
                f"{line.said()} from {written(start, unit)} at update {first} to {written(end, unit)} at update {last}"
            )
    return "; ".join(parts) or "no update that every seed has"


def _step(span: float, about: int) -> float:
    """The round step (1, 2 or 5 times a power of ten) that cuts `span` into `about` parts at most."""
    rough = (span or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _axes(scale: Scale, unit: Unit) -> list[Element]:
    made = []
    low, high = scale.values
    step = _step(high - low, 5)
    for index in range(round(low / step), round(high / step) + 1):
        value, y = index * step, f"{scale.y(index * step):.1f}"
        text = (f"{100 * value:.6g}%" if unit.is_share else f"{value:,.6g}").replace("-", "\u2212")
        made.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, cls="axis" if index == 0 else "grid"))
        made.append(el("text", text, x=LEFT - 8, y=y, dy="0.35em", text_anchor="end", cls="tick"))
    first, last = scale.updates
    step = max(1, round(_step(last - first, 6)))
    for update in range(math.ceil(first / step) * step, last + 1, step):
        x = f"{scale.x(update):.1f}"
        made.append(el("text", f"{update:,}", x=x, y=HEIGHT - BOTTOM + 18, text_anchor="middle", cls="tick"))
    made.append(el("text", "update", x=WIDTH - RIGHT, y=HEIGHT - 6, text_anchor="end", cls="tick"))
    return made


def _curves(lines: Sequence[Line], scale: Scale, unit: Unit, *, is_small: bool) -> list[Element]:
    made: list[Element] = []
    ends: list[tuple[float, float, str, str]] = []
    for index, line in reversed(list(enumerate(lines))):  # the first line is what the chart is about: on top
        color = f"c{index % COLORS}"
        mean = line.mean
        seeds = [points for points in line.by_seed.values() if points]
        if len(seeds) > 1:
            made += [el("path", d=_path(points, scale), cls=f"seed {color}") for points in seeds]
        main: Points = tuple(mean)
        if len(seeds) == 1:
            main = seeds[0]  # with its gaps
        if len(mean) > SMOOTH_FROM:
            if len(seeds) == 1:
                made.append(el("path", d=_path(main, scale), cls=f"seed {color}"))
            main = tuple(smoothed(mean))
        made.append(el("path", d=_path(main, scale), cls=f"mean {color}"))
        if not is_small or len(mean) == 1:
            made += _marks(mean, scale, unit, color, line.said())
        if mean:
            x, y = scale.x(mean[-1][0]), scale.y(mean[-1][1])
            ends.append((y, x, written(mean[-1][1], unit), color))
    return made + _end_labels(ends)


def _marks(mean: Known, scale: Scale, unit: Unit, color: str, name: str) -> list[Element]:
    """What says its figure where it is pointed at, at each point; a dot where there are few enough to be told apart."""
    if len(mean) > MOST_TIPS:
        return []
    size, cls = (3.2, color) if len(mean) <= MOST_DOTS else (6, "tip")
    return [
        el(
            "circle", el("title", f"{name}, update {update}: {written(value, unit)}"), cx=f"{scale.x(update):.1f}",
            cy=f"{scale.y(value):.1f}", r=size, cls=cls,
        )
        for update, value in mean
    ]  # fmt: skip


def _end_labels(ends: Sequence[tuple[float, float, str, str]]) -> list[Element]:
    """The last figure of each line beside its end; labels that would touch are moved apart."""
    made: list[Element] = []
    above = -math.inf
    for y, x, text, color in sorted(ends):
        y = max(y, above + _LABEL_GAP)
        above = y
        made.append(el("text", text, x=f"{x + 8:.1f}", y=f"{y:.1f}", dy="0.35em", cls=f"end {color}"))
    return made


def _path(points: Points, scale: Scale) -> str:
    """Pen down from point to point, up over a gap. Of very many points every k-th is drawn, and the last."""
    stride = max(1, math.ceil(len(points) / MOST_DRAWN))
    kept = points[::stride] if (len(points) - 1) % stride == 0 else (*points[::stride], points[-1])
    parts, is_down = [], False
    for update, value in kept:
        if value is not None:
            parts.append(f"{'L' if is_down else 'M'}{scale.x(update):.1f} {scale.y(value):.1f}")
        is_down = value is not None
    return "".join(parts)


def smoothed(points: Known) -> Known:
    """Centred moving mean over about a tenth of the points; shorter at the ends, so that it does not lag."""
    half = max(1, len(points) // 20)
    found = []
    for index, (update, _) in enumerate(points):
        window = [value for _, value in points[max(0, index - half) : index + half + 1]]
        found.append((update, math.fsum(window) / len(window)))
    return found


def _legend(lines: Sequence[Line]) -> Element:
    items = [
        el("li", el("i", cls=f"c{index % COLORS}"), el("span", line.said(), title=line.name))
        for index, line in enumerate(lines)
    ]
    num_seeds = max(sum(bool(points) for points in line.by_seed.values()) for line in lines)
    notes = [f"thin: each of {num_seeds} seeds, thick: their mean"] if num_seeds > 1 else []
    if smooth := [line.said() for line in lines if len(line.mean) > SMOOTH_FROM]:
        notes.append(f"smoothed over a tenth: {listed(smooth)}")
    note = el("li", f"({'; '.join(notes)})") if notes else None
    return el("ul", *items, note, cls="legend")


def figures(lines: Sequence[Line]) -> list[Element]:
    """The values of the lines as one table, a row for each update; of very many every k-th, and the last."""
    columns = []
    for line in lines:
        unit = unit_of(line.name, line.values())
        for seed, points in line.by_seed.items():
            heading = line.said() + ("" if seed == ALL else f", seed {seed}")
            columns.append((heading, dict(points), unit))
        if len(line.by_seed) > 1:
            columns.append((f"{line.said()}, mean", dict(line.mean), unit))
    updates = sorted({update for _, column, _ in columns for update in column})
    stride = math.ceil(len(updates) / MOST_ROWS)
    kept = [u for index, u in enumerate(updates) if index % stride == 0 or u == updates[-1]]
    rows = [
        el("tr", el("th", f"{u:,}", scope="row"), *(_cell(column, u, unit) for _, column, unit in columns))
        for u in kept
    ]
    head: list[Child] = ["update", *(heading for heading, _, _ in columns)]
    made = [table(head, rows, cls="figures")]
    if stride > 1:
        made.append(el("p", f"One of {stride} of the {len(updates):,} updates; report.json has all.", cls="reading"))
    return made


def _cell(column: Mapping[int, float | None], update: int, unit: Unit) -> Element:
    if update not in column:
        return el("td", "–")
    shown = figure(column[update], unit)
    shown.attrib.pop("title", None)  # there are many
    return el("td", shown)
