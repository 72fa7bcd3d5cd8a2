"""Curves as in Figures 2 and 3 of the DeepSeek-R1 paper (arXiv 2501.12948): accuracy and mean response length over the
updates of each RL stage, and what else a stage recorded."""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1mega.pipeline.page.chart import Line, chart, figures, value_range
from r1mega.pipeline.page.input import ALL, Stage
from r1mega.pipeline.page.markup import Element, details, el
from r1mega.pipeline.page.text import anchor, label, unit_of

_ACCURACY = re.compile(r"accura|(pass|cons)(@|_at_)\d")
_LOSS = re.compile(r"(^|/)loss$")
_LENGTH = re.compile(r"(response|output|answer)_?(tokens|length|len)(_mean)?$|(^|/)(mean_)?(length|tokens)$")
# What is measured on held-out questions is what a chart is about; it stands first and on top.
_HELD_OUT = re.compile(r"^(eval|test|held)|held.?out|pass(@|_at_)1$")
# In the chart of accuracy, "accuracy" would say nothing.
_LEGENDS = {
    "reward/accuracy": "training samples",
    "train/accuracy": "training samples",
    "rollout/response_tokens": "training samples",
    "eval/response_tokens": "held-out samples",
}
Panel = tuple[str, list[Line]]


def curves(stages: Sequence[Stage], num_seeds: int) -> Element:
    """A section for each stage with a history; the two charts of the figures have one scale in all stages. `num_seeds`:
    of the run, which may have more than the curves."""
    by_stage = [(stage, *_panels(stage)) for stage in stages]
    shown = [(stage, main, others) for stage, main, others in by_stage if main or others]
    if not shown:
        return el("p", "none", cls="none")
    made = el("div")
    reaches = {}
    for title in ("Accuracy", "Mean response length, tokens"):
        lines = [line for _, main, _ in shown for name, panel in main if name == title for line in panel]
        reaches[title] = value_range([value for line in lines for value in line.values()])
    for index, (stage, main, others) in enumerate(shown):
        updates = [update for _, lines in main + others for line in lines for update in line.updates()]
        span = min(updates), max(updates)
        section = el(
            "section",
            el("h3", stage.name),
            el("p", stage.about, cls="about") if stage.about else None,
            id=anchor("curves", index),
        )
        if main:
            section.append(
                el("div", *(_drawn(panel, span, reaches.get(panel[0]), is_small=False) for panel in main), cls="panels")
            )
        if others:
            drawn = el("div", *(_drawn(panel, span, None, is_small=True) for panel in others), cls="panels")
            values = details("The figures", *figures([line for _, lines in others for line in lines]))
            section.append(details(f"Also recorded: {', '.join(title for title, _ in others)}", drawn, values))
        made.append(section)
    if num_seeds > 1 and any(ALL in by_seed for stage in stages for by_seed in stage.history.values()):
        text = f"The run has {num_seeds} seeds; where one line is drawn, report.json gives that of one of them."
        made.append(el("p", text, cls="reading"))
    without = [stage.name for stage in stages if all(stage is not one for one, _, _ in shown)]
    if without:
        made.append(el("p", f"Without a history: {', '.join(without)}.", cls="reading"))
    return made


def _panels(stage: Stage) -> tuple[list[Panel], list[Panel]]:
    """The charts of the paper's figures, or the loss where there is neither, and one for each other metric that has a
    value."""
    lines = [Line(name, by_seed, _LEGENDS.get(name, "")) for name, by_seed in stage.history.items()]
    lines = [line for line in lines if line.values()]
    lines.sort(key=lambda line: not _HELD_OUT.search(line.name.lower()))  # stable: else in the order of the report
    accuracy = [line for line in lines if _ACCURACY.search(line.name.lower())]
    length = [line for line in lines if _LENGTH.search(line.name.lower())]
    main = [("Accuracy", accuracy), ("Mean response length, tokens", length)]
    if not accuracy and not length:
        main = [("Loss", [line for line in lines if _LOSS.search(line.name)])]
    shown = [line for _, panel in main for line in panel]
    rest = [line for line in lines if line not in shown]
    return [(title, panel) for title, panel in main if panel], [(label(line.name), [line]) for line in rest]


def _drawn(panel: Panel, span: tuple[int, int], reach: tuple[float, float] | None, *, is_small: bool) -> Element:
    title, lines = panel
    values = [value for line in lines for value in line.values()]
    unit = unit_of(lines[0].name, values)
    reach = reach or value_range(values, from_zero=False)
    return chart(title, lines, unit, span, reach, is_small=is_small)
