"""The findings, and the stages with their metrics as in the paper's Table 3."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from r1mega.pipeline.page.input import ALL, Finding, Stage, mean
from r1mega.pipeline.page.markup import Child, Element, add, definitions, details, el, table
from r1mega.pipeline.page.text import Unit, breakable, direction, figure, label, listed, unit_of, written

_VERDICTS = {True: ("holds", "holds"), False: ("does not show", "fails"), None: ("not decided", "open")}
_ACCURACY = re.compile(r"accura|(pass|cons)(@|_at_)\d")
_BAR, _PAD = 240, 8  # width of the drawing of a difference, room at its ends


def findings(found: Sequence[Finding]) -> Element:
    """A card for each finding, in the order of the report."""
    if not found:
        return el("p", "none", cls="none")
    return el("ul", *(_finding(one) for one in found), cls="findings")


def _finding(one: Finding) -> Element:
    text, cls = _VERDICTS[one.holds]
    values = (one.value, one.baseline, one.difference)
    unit = unit_of(f"{one.name} {one.claim}", values, bounded_is_share=True)
    if one.unit is not None:
        unit = Unit(is_share=True) if one.unit == "share" else unit_of("", values)
    interval: Child = el("span", "none", cls="none")
    if one.interval is not None:
        low, high = one.interval
        interval = el("span", figure(low, unit, signed=True), " to ", figure(high, unit, signed=True))
    rows: list[tuple[str, Child]] = [
        ("figure", figure(one.value, unit, cls="big")),
        ("baseline", figure(one.baseline, unit, cls="big")),
        ("difference", figure(one.difference, unit, signed=True, cls="big")),
        ("interval", interval),
    ]
    return el(
        "li",
        el("p", el("strong", text, cls="verdict"), " ", el("span", label(one.name), cls="name"), cls="head"),
        el("p", one.claim, cls="claim"),
        definitions(rows, cls="figures"),
        _difference(one, unit),
        el("p", one.note, cls="note") if one.note else None,
        cls=cls,
    )


def _difference(one: Finding, unit: Unit) -> Element | None:
    """The difference and its interval on a line through zero; None without an interval."""
    if one.difference is None or one.interval is None:
        return None
    low, high = one.interval
    reach = max(abs(low), abs(high), abs(one.difference)) or 1.0
    middle = _BAR / 2

    def at(value: float) -> str:
        return f"{middle + value / reach * (middle - _PAD):.1f}"

    said = f"difference {written(one.difference, unit, signed=True)}, from {written(low, unit, signed=True)} to "
    return el(
        "svg",
        el("line", x1=0, x2=_BAR, y1=13, y2=13, cls="axis"),
        el("line", x1=middle, x2=middle, y1=4, y2=22, cls="zero"),
        el("line", x1=at(low), x2=at(high), y1=13, y2=13, cls="interval"),
        el("circle", cx=at(one.difference), cy=13, r=4.5, cls="dot"),
        el("text", "0", x=middle, y=34, text_anchor="middle"),
        viewBox=f"0 0 {_BAR} 38",
        cls="difference",
        role="img",
        aria_label=said + written(high, unit, signed=True),
    )


def stage_table(stages: Sequence[Stage]) -> Element:
    """Metrics down, stages across: a table for each lot of stages that have metrics in common, that of the evaluations
    first and the others folded; what only one stage has stands below."""
    having: dict[str, list[Stage]] = {}
    for stage in stages:
        for name in stage.metrics:
            having.setdefault(name, []).append(stage)
    if not having:
        return el("p", "none", cls="none")
    shared = {name: ones for name, ones in having.items() if len(ones) > 1}
    made = el("div")
    for index, names in enumerate(sorted(_lots(shared), key=lambda names: -max(map(_weight, names)))):
        across = [stage for stage in stages if any(name in stage.metrics for name in names)]
        head: list[Child] = ["", *(breakable(stage.name, stage.about) for stage in across)]
        one = table(head, [_metric_row(name, across) for name in names], cls="stages")
        if index == 0:
            add(made, one, el("p", _READING, cls="reading"))
        else:
            made.append(details(f"The figures of {listed([stage.name for stage in across])}", one))
    alone = [(stage, {n: v for n, v in stage.metrics.items() if n not in shared}) for stage in stages]
    alone = [(stage, own) for stage, own in alone if own]
    if alone:
        made.append(el("h3", "Of one stage alone"))
        made.append(definitions((stage.name, _own(own)) for stage, own in alone))
    return made


def _lots(having: Mapping[str, Sequence[Stage]]) -> list[list[str]]:
    """The metrics in lots: two are in one where a stage has both, or stages in a chain lead from one to the other."""
    lots: list[tuple[set[str], list[str]]] = []  # names of stages, metrics
    for name, ones in having.items():
        members, names = {stage.name for stage in ones}, [name]
        for lot in [lot for lot in lots if lot[0] & members]:
            lots.remove(lot)
            members, names = members | lot[0], [*lot[1], *names]
        lots.append((members, names))
    order = list(having)
    return [sorted(names, key=order.index) for _, names in lots]


def _weight(name: str) -> int:
    """How much a metric is what a table of stages is for: the accuracy of an evaluation, not a training's last one."""
    return 0 if not _ACCURACY.search(name.lower()) else 1 if "/" in name else 2


_READING = (
    "Bold: the best of its row, where more (↑) or less (↓) is better. Below each figure the change from the nearest "
    "stage to its left that has one; where several seeds ran, the figure is their mean and each seed's stands under it."
)


def _metric_row(name: str, across: Sequence[Stage]) -> Element:
    """One metric: its figure in each stage, the difference to the one before, the figures of the seeds."""
    by_seed = {stage.name: stage.metrics.get(name) for stage in across}
    means = {stage: mean(values) for stage, values in by_seed.items() if values is not None}
    unit = unit_of(name, (value for values in by_seed.values() for value in (values or {}).values()))
    way = direction(name)
    known = [value for value in means.values() if value is not None]
    best = {1: max, -1: min}[way](known) if way and len(known) > 1 and len(set(known)) > 1 else None
    arrow = {1: " ↑", -1: " ↓", 0: ""}[way]
    cells = [el("th", label(name), el("span", arrow, cls="way"), scope="row", title=name)]
    before: float | None = None
    for stage in across:
        cells.append(_cell(by_seed[stage.name], means.get(stage.name), before, unit, way, best))
        if means.get(stage.name) is not None:
            before = means[stage.name]
    return el("tr", *cells)


def _cell(
    by_seed: Mapping[str, float | None] | None, value: float | None, before: float | None, unit: Unit, way: int,
    best: float | None,
) -> Element:  # fmt: skip
    if by_seed is None:
        return el("td", "–", cls="absent")
    shown = figure(value, unit)
    cell = el("td", el("b", shown) if value is not None and value == best else shown)
    if value is None or before is None:
        cell.append(el("span", "\u00a0", cls="change"))
    else:
        change = value - before
        cls = "change" + ("" if not way or change == 0 else " better" if change * way > 0 else " worse")
        cell.append(el("span", figure(change, unit, signed=True), cls=cls))
    if ALL not in by_seed:
        cell.append(_seeds(by_seed, unit))
    return cell


def _seeds(by_seed: Mapping[str, float | None], unit: Unit) -> Element:
    parts: list[Child] = []
    for seed, value in by_seed.items():
        shown = figure(value, unit)
        shown.set("title", f"seed {seed}: {'none' if value is None else repr(value)}")
        shown.text = (shown.text or "").rstrip("%")  # the column is narrow, and the mean above has it
        parts += [" · " if parts else None, shown]
    return el("span", *parts, cls="seeds")


def _own(metrics: Mapping[str, Mapping[str, float | None]]) -> Element:
    """The figures that one stage alone has, as a line."""
    parts: list[Child] = []
    for name, by_seed in metrics.items():
        unit = unit_of(name, by_seed.values())
        parts += [" · " if parts else None, f"{label(name)} ", figure(mean(by_seed), unit)]
        if ALL not in by_seed:
            parts += [" (", _seeds(by_seed, unit), ")"]
    return el("span", *parts)
