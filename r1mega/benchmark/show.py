"""A report on the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_MOST_PROBLEMS = 40
_MOST_CHARACTERS = 24


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the figures with the paper's beside them, then the problems, the hardest first."""
    head = f"{report['benchmark']}: {report['problems']} problems x {report['samples_per_problem']} samples"
    console.print(Text(f"{head}, {report['model']}"))
    if report["metrics"]:
        console.print(_figures(report))
    tokens = report["response_tokens"]
    notes = [
        f"response tokens: mean {tokens['mean']:,.0f}, median {tokens['median']:,}, p90 {tokens['p90']:,}",
        f"cut off {report['cut_off']:.1%}",
    ]
    if report["no_answer"] is not None:
        notes.append(f"without an answer {report['no_answer']:.1%}")
    if report["ungraded"]:
        notes.append(f"{report['ungraded']} could not be graded and count as wrong")
    console.print(Text("; ".join(notes)))
    if report["metrics"]:
        console.print(_problems(report))


def _figures(report: Mapping[str, Any]) -> Table:
    """Our figures as the first rows, the paper's of the same benchmark below."""
    ours = {name: f"{100 * m['value']:.1f} [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
            for name, m in report["metrics"].items()}  # fmt: skip
    if "rating" in report:
        ours |= {"rating": f"{report['rating']:.0f}", "percentile": f"{100 * report['percentile']:.1f}"}
    paper = _paper_rows(report["paper"])
    names = list(dict.fromkeys([*ours, *(name for _, row, _ in paper for name in row)]))
    title = "percent, with the 95% interval over problems"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("of the paper", no_wrap=True)
    table.add_row("this model", *(ours.get(name, "-") for name in names), "", style="bold")
    for model, row, tables in paper:
        table.add_row(model, *(_paper_cell(name, row.get(name)) for name in names), tables)
    return table


def _paper_rows(figures: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, float], str]]:
    """(model, metric -> value, tables): a row for each model, and one more where a table says otherwise."""
    rows: list[tuple[str, dict[str, float], list[str]]] = []
    for figure in figures:
        model, metric, table = figure["model"], figure["metric"], figure["table"]
        fits = (row for row in rows if row[0] == model and metric not in row[1])
        row = next(fits, None)
        if row is None:
            row = (model, {}, [])
            rows.append(row)
        row[1][metric] = figure["value"]
        if table not in row[2]:
            row[2].append(table)
    return [(model.removeprefix("DeepSeek-"), values, ", ".join(tables)) for model, values, tables in rows]


def _paper_cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "rating" else f"{100 * value:.1f}"


def _problems(report: Mapping[str, Any]) -> Table:
    lines = sorted(report["table"], key=lambda line: line["pass@1"])
    title = f"problems, the hardest first (report.json has all {len(lines)})"
    table = Table("problem", "pass@1", "answer", "most given", "votes", "tokens", "cut off", title=title,
                  title_justify="left")  # fmt: skip
    for line in lines[:_MOST_PROBLEMS]:
        table.add_row(
            Text(_short(line["id"])),
            f"{100 * line['pass@1']:.1f}",
            Text(_short(line.get("answer", ""))),
            Text(_short(line.get("most_given") or "-")),
            str(line.get("votes", "-")),
            f"{line['mean_tokens']:,.0f}",
            str(line["cut_off"]),
        )
    return table


def _short(text: str) -> str:
    """One line of a known width; a model may have written anything."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= _MOST_CHARACTERS else plain[: _MOST_CHARACTERS - 3] + "..."


def plot(report: Mapping[str, Any], tokens: list[int], path: Path) -> None:
    """Share right of each problem, and how long responses are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = sorted((line["pass@1"] for line in report["table"] if "pass@1" in line), reverse=True)
    left.bar(range(len(shares)), shares, width=1.0)
    left.set(title=f"{report['benchmark']}: share right", xlabel="problem, easiest first", ylim=(0, 1))
    right.hist(tokens, bins=40)
    right.set(title="response length", xlabel="tokens", ylabel="responses")
    figure.savefig(path, dpi=120)
