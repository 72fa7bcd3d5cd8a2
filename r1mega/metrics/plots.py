"""Pictures of a run, drawn from its metrics.jsonl: what the model learned, and how the training went."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from r1mega.metrics.catalog import PHASES
from r1mega.metrics.history import METRICS_FILE, phase_seconds, read_metrics, series
from r1mega.metrics.summary import SUMMARY_FILE

CURVES_FILE, TRAINING_FILE = "curves.png", "training.png"
DPI = 150
# Okabe and Ito's colours, told apart by people with colour-blindness too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A",
)  # fmt: skip
PHASE_COLORS = dict(zip(PHASES, (BLUE, GREEN, ORANGE, PURPLE, SKY, GREY), strict=True))
OTHER_PHASE_COLOR = "#C8C8C8"
INK, MUTED, GRID = "#222222", "#6B6B6B", "#E4E4E4"
BARS_UP_TO = 60  # steps; beyond, one bar is thinner than a few pixels and an area reads better
WIDE = 10  # ratio of largest to smallest value from which a logarithmic axis shows more
Points = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Panel:
    """One small chart of training.png: metrics drawn together, as (name, legend, colour)."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    log_when_wide: bool = False  # a quantity that spans decades is drawn on a logarithmic axis


PANELS = (
    Panel("Loss", (("train/loss", "loss", BLUE),)),
    Panel("KL to the reference (nats per token)", (("train/kl", "KL", BLUE),)),
    Panel("Clipped tokens", (("train/clip_fraction", "clip fraction", BLUE),)),
    Panel("Gradient norm", (("train/grad_norm", "gradient norm", BLUE),), log_when_wide=True),
    Panel("Entropy (nats per token)", (("train/entropy", "entropy", BLUE),)),
    Panel(
        "Log-prob gap, engine to trainer",
        (("sync/logprob_gap_max", "max", RED), ("sync/logprob_gap_mean", "mean", BLUE)),
        log_when_wide=True,
    ),
    Panel("Learning rate", (("train/lr", "learning rate", BLUE),)),
    Panel("Tokens per second", (("perf/tokens_per_second", "tokens/s", BLUE),)),
)


def plot_run(run_dir: str | os.PathLike[str], title: str | None = None) -> list[Path]:
    """Draw curves.png (accuracy and response length over updates) and training.png into `run_dir`.

    curves.png has the two panels of Figures 2 and 3 of the DeepSeek-R1 paper (arXiv 2501.12948): held-out pass@1, and
    the average response length. What the run did not measure is left out, and a picture with nothing to show is not
    written. `title` None is made of the directory's name and, where summary.json is there, its model, layout and seed.

    Returns the paths written. Raises FileNotFoundError without metrics.jsonl, ValueError where that is malformed or has
    nothing to draw.
    """
    directory = Path(run_dir)
    records = read_metrics(directory / METRICS_FILE)
    heading = title if title is not None else _default_title(directory)
    drawn = [(CURVES_FILE, _draw_curves(records, heading)), (TRAINING_FILE, _draw_training(records, heading))]
    written = []
    for name, figure in drawn:
        if figure is not None:
            figure.savefig(directory / name, dpi=DPI, facecolor="white")
            written.append(directory / name)
    if not written:
        raise ValueError(f"{directory / METRICS_FILE} has no finite value of any metric that is plotted")
    return written


def _default_title(directory: Path) -> str:
    parts = [directory.resolve().name]
    summary = directory / SUMMARY_FILE
    if summary.exists():
        values = json.loads(summary.read_text(encoding="utf-8"))
        parts += [str(values[key]) for key in ("model", "layout") if values.get(key) is not None]
        parts += [f"seed {values['seed']}"] if values.get("seed") is not None else []
    return "  ·  ".join(parts)


def _draw_curves(records: Sequence[dict[str, Any]], heading: str) -> Figure | None:
    held_out, training = series(records, "eval/pass_at_1"), series(records, "reward/accuracy")
    lengths, tested_lengths = series(records, "rollout/response_tokens"), series(records, "eval/response_tokens")
    has_accuracy, has_length = bool(held_out[0] or training[0]), bool(lengths[0] or tested_lengths[0])
    count = has_accuracy + has_length
    if count == 0:
        return None
    figure = _figure(5.6 * count + 0.4, 4.2, heading)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if has_accuracy:
        _accuracy_panel(panels.pop(0), held_out, training)
    if has_length:
        _length_panel(panels.pop(0), records, lengths, tested_lengths)
    return figure


def _accuracy_panel(axes: Axes, held_out: Points, training: Points) -> None:
    if training[0]:
        axes.plot(*training, color=SKY, alpha=0.35, linewidth=1)
        axes.plot(training[0], _smooth(training[1]), color=SKY, linewidth=1.6, label="training samples")
    if held_out[0]:
        axes.plot(*held_out, color=BLUE, linewidth=2.2, marker="o", markersize=4.5, label="held-out pass@1", zorder=3)
        _mark_ends(axes, held_out, [f"{100 * value:.1f}%" for value in held_out[1]], BLUE)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _dress(axes, "Accuracy", "accuracy", legend_at="lower right")


def _length_panel(axes: Axes, records: Sequence[dict[str, Any]], lengths: Points, held_out: Points) -> None:
    if lengths[0]:
        band = _length_band(records, lengths)
        if band is not None:
            updates, low, high, label = band
            axes.fill_between(updates, low, high, color=GREEN, alpha=0.13, linewidth=0, label=label)
        axes.plot(*lengths, color=GREEN, linewidth=2.0, label="training samples, mean", zorder=3)
    if held_out[0]:
        axes.plot(
            *held_out, color=INK, linewidth=1.2, marker="o", markersize=3.5, label="held-out samples, mean", zorder=4
        )
    shown, color = (lengths, GREEN) if lengths[0] else (held_out, INK)
    _mark_ends(axes, shown, [f"{value:.0f}" for value in shown[1]], color)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    _dress(axes, "Average response length", "tokens per response", legend_at="lower right")


def _length_band(
    records: Sequence[dict[str, Any]], mean: Points
) -> tuple[list[int], list[float], list[float], str] | None:
    """Updates, lower edge, upper edge and label of the best spread the run reports; None where it reports none."""
    around = dict(zip(*mean, strict=True))
    spread = dict(zip(*series(records, "rollout/response_tokens_std"), strict=True))
    low = dict(zip(*series(records, "rollout/response_tokens_min"), strict=True))
    high = dict(zip(*series(records, "rollout/response_tokens_max"), strict=True))
    if updates := sorted(around.keys() & spread.keys()):
        below = [max(0.0, around[u] - spread[u]) for u in updates]
        return updates, below, [around[u] + spread[u] for u in updates], "one standard deviation"
    if updates := sorted(around.keys() & low.keys() & high.keys()):
        return updates, [low[u] for u in updates], [high[u] for u in updates], "shortest to longest"
    if updates := sorted(around.keys() & high.keys()):
        return updates, [around[u] for u in updates], [high[u] for u in updates], "mean to longest"
    return None


def _draw_training(records: Sequence[dict[str, Any]], heading: str) -> Figure | None:
    panels = []
    for panel in PANELS:
        lines = [(series(records, name), label, color) for name, label, color in panel.lines]
        if any(points[0] for points, _, _ in lines):
            panels.append((panel, [line for line in lines if line[0][0]]))
    unit, timed, phases = phase_seconds(records)
    count = len(panels) + bool(timed)
    if count == 0:
        return None
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = _figure(4.4 * columns, 3.0 * rows + 0.4, heading)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (panel, lines) in zip(grid, panels, strict=False):
        _line_panel(axes, panel, lines)
    if timed:
        _phase_panel(grid[len(panels)], unit, timed, phases)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure


def _line_panel(axes: Axes, panel: Panel, lines: Sequence[tuple[Points, str, str]]) -> None:
    for (updates, values), label, color in lines:
        marker = "o" if len(updates) == 1 else None  # a line of one point would not be seen
        axes.plot(updates, values, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)
    values = [value for (_, column), _, _ in lines for value in column]
    if panel.log_when_wide and min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    elif min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) if max(values) > 0 else 1)
    _dress(axes, panel.title, None, legend_at="best" if len(lines) > 1 else None)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(_tick)


def _phase_panel(axes: Axes, unit: str, updates: Sequence[int], phases: dict[str, list[float]]) -> None:
    order = [name for name in PHASES if name in phases] + sorted(phases.keys() - set(PHASES))
    colors = [PHASE_COLORS.get(name, OTHER_PHASE_COLOR) for name in order]
    if len(updates) > BARS_UP_TO:
        axes.stackplot(updates, [phases[name] for name in order], labels=order, colors=colors)
    else:
        gaps = [b - a for a, b in zip(updates, updates[1:], strict=False) if b > a]
        width = 0.85 * min(gaps, default=1)
        base = [0.0] * len(updates)
        for name, color in zip(order, colors, strict=True):
            axes.bar(updates, phases[name], width=width, bottom=base, label=name, color=color)
            base = [low + step for low, step in zip(base, phases[name], strict=True)]
    axes.margins(y=0.05)
    _dress(axes, f"Seconds per {unit}, by phase", "seconds", legend_at=None)
    handles, names = axes.get_legend_handles_labels()
    # Outside the axes: bars fill all of it. Top to bottom in the order of the stack.
    axes.legend(
        handles[::-1], names[::-1], fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0),
        handlelength=1.0,
    )  # fmt: skip


def _figure(width: float, height: float, heading: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, no display needed
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure.suptitle(heading, fontsize=10, color=MUTED)
    return figure


def _tick(value: float, _position: int) -> str:
    """A tick label that says its own power of ten, instead of one factor for the whole axis."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{value:,.6g}" if plain else f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _mark_ends(axes: Axes, points: Points, texts: Sequence[str], color: str) -> None:
    """Write the first and the last value beside their points, on the side away from the rising or falling curve."""
    updates, values = points
    rises = values[-1] >= values[0]
    for index in dict.fromkeys((0, len(updates) - 1)):
        above = rises == (index > 0) or len(updates) == 1
        axes.annotate(
            texts[index], (updates[index], values[index]), xytext=(0, 9 if above else -9), textcoords="offset points",
            va="bottom" if above else "top",
            ha="left" if index == 0 else "right", fontsize=9, fontweight="bold", color=color, zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a tenth of the series; shorter at its ends, so that it does not lag."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _dress(axes: Axes, title: str, y_label: str | None, legend_at: str | None) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("update", fontsize=9, color=MUTED)
    if y_label:
        axes.set_ylabel(y_label, fontsize=9, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8.5, colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    if legend_at is not None:
        axes.legend(fontsize=8.5, frameon=False, loc=legend_at)
