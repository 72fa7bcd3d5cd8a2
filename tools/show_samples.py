#!/usr/bin/env python
"""Read what a run generated: the samples of its samples.jsonl, or the same prompt at its first and last update."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.panel import Panel

SAMPLES_FILE = "samples.jsonl"
# Fields this program shows, and the JSON types they may have.
FIELDS: dict[str, tuple[type, ...]] = {
    "update": (int,),
    "round": (int,),
    "prompt_id": (str,),
    "question": (str,),
    "answer": (str,),
    "text": (str,),
    "reward": (int, float, type(None)),
    "parts": (dict,),
    "finish_reason": (str,),
    "num_tokens": (int,),
    "weight_version": (int,),
    "split": (str,),
}
EXAMPLES = """examples:
  show_samples.py runs/demo --round 3 --best     the best samples of round 3
  show_samples.py runs/demo --prompt add-17      every sample of one prompt
  show_samples.py runs/demo --compare            the same prompts before and after training, side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, or 2 after a message on standard error."""
    options = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a model may emit what the terminal's encoding lacks
    try:
        path = options.run_dir / SAMPLES_FILE if options.run_dir.is_dir() else options.run_dir
        records = select(read_samples(path), options)
        pairs = first_and_last(records, options) if options.compare else []
        from rich.console import Console  # here, so that --help answers at once

        console = Console(highlight=False)
        if options.compare:
            show_pairs(console, pairs)
        else:
            show_records(console, records, options.limit)
    except ValueError as error:
        print(f"show_samples: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="show_samples.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or a samples file itself")
    parser.add_argument("--round", type=int, metavar="N", help="only samples of this round")
    parser.add_argument("--update", type=int, metavar="N", help="only samples made after this many updates")
    parser.add_argument("--prompt", metavar="ID", help="only samples of this prompt")
    parser.add_argument("--split", choices=("train", "eval"), help="only training or only held-out samples")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--best", action="store_true", help="highest reward first")
    order.add_argument("--worst", action="store_true", help="lowest reward first")
    parser.add_argument("--limit", type=_positive, default=5, metavar="N", help="how many to show (default: 5)")
    parser.add_argument("--compare", action="store_true", help="first and last update of the same prompt side by side")
    return parser


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The records of a samples file. Raises ValueError naming the file, and the line of the first one that is wrong."""
    from r1mega.metrics.jsonl import read_jsonl

    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the directory of a run that has saved samples")
    records = []
    for number, record in read_jsonl(path):
        for name, types in FIELDS.items():
            if name not in record:
                raise ValueError(f"{path}:{number}: field {name!r} is missing")
            value = record[name]
            if not isinstance(value, types) or isinstance(value, bool):
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
                raise ValueError(f"{path}:{number}: field {name!r} is {value!r}, expected {expected}")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no samples")
    return records


def select(records: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records the options ask for, in the order they ask for; samples without a reward come last in that order.

    Raises ValueError naming the filter that leaves nothing, with the values it could have had.
    """
    for name, field in (("split", "split"), ("round", "round"), ("update", "update"), ("prompt", "prompt_id")):
        wanted = getattr(options, name)
        if wanted is None:
            continue
        present = sorted({record[field] for record in records})
        records = [record for record in records if record[field] == wanted]
        if not records:
            listed = ", ".join(map(str, present[:12])) + (", ..." if len(present) > 12 else "")
            raise ValueError(f"--{name} {wanted}: no such sample; there are {listed}")
    if options.best or options.worst:
        sign = -1 if options.best else 1
        records = sorted(records, key=lambda r: (r["reward"] is None, sign * (r["reward"] or 0.0)))
    return records


def first_and_last(records: list[dict[str, Any]], options: argparse.Namespace) -> list[tuple[dict[str, Any], ...]]:
    """For each prompt seen at two updates or more, one sample of its first and one of its last update.

    Of several samples at one update the first in the order of `records` is taken. Raises ValueError where no prompt
    comes back.
    """
    prompts: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        prompts.setdefault(record["prompt_id"], {}).setdefault(record["update"], record)
    pairs = [(seen[min(seen)], seen[max(seen)]) for seen in prompts.values() if len(seen) > 1]
    if not pairs:
        raise ValueError(
            "--compare: no prompt among these samples was answered at two different updates; "
            "drop --update and --round, or use --split eval (held-out prompts come back at every evaluation)"
        )
    return pairs[: options.limit]


def show_records(console: Console, records: Sequence[dict[str, Any]], limit: int) -> None:
    """Print one panel a sample, and how many were left out."""
    for record in records[:limit]:
        console.print(_panel(record, with_question=True))
    if len(records) > limit:
        console.print(f"{limit} of {len(records)} samples; --limit shows more", style="bright_black")


def show_pairs(console: Console, pairs: Sequence[tuple[dict[str, Any], ...]]) -> None:
    """Print each pair side by side under its question; one above the other where the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    for pair in pairs:
        first = pair[0]
        console.rule(Text(f"{_printable(first['prompt_id'])} ({first['split']})"), style="bright_black")
        console.print(_question(first))
        panels = [_panel(record, with_question=False) for record in pair]
        if console.width < 70:
            console.print(*panels, sep="\n")
            continue
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in panels:
            table.add_column(ratio=1)
        table.add_row(*panels)
        console.print(table)


def _question(record: dict[str, Any]) -> Any:
    from rich.text import Text

    text = Text(_printable(record["question"]))
    return text.append("\nanswer ", style="bright_black").append(_printable(record["answer"]), style="bold")


def _panel(record: dict[str, Any], with_question: bool) -> Panel:
    from rich.console import Group
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    reward = record["reward"]
    style = "bright_black" if reward is None else "green" if reward > 0 else "red"
    parts = ", ".join(f"{_printable(str(name))} {_number(value)}" for name, value in record["parts"].items())
    score = "not scored" if reward is None else f"reward {_number(reward)}" + (f" ({parts})" if parts else "")
    facts = f"{record['num_tokens']} tokens, {record['finish_reason']}, weights {record['weight_version']}"
    where = f"update {record['update']}, round {record['round']}"
    title = f" {where} " if not with_question else f" {_printable(record['prompt_id'])} · {record['split']} · {where} "
    body: list[Any] = [_question(record), Rule(style="bright_black")] if with_question else []
    body += [_highlighted(record["text"]), Text(f"\n{score}", style=style), Text(facts, style="bright_black")]
    return Panel(Group(*body), title=Text(title), title_align="left", border_style=style)


def _highlighted(text: str) -> Any:
    """The response with its thinking dimmed and its answer bold; an unclosed part reaches to the end."""
    from rich.text import Text

    shown = Text(_printable(text))
    for tag, style in (("think", "bright_black"), ("answer", "bold")):
        for match in re.finditer(rf"<{tag}>.*?(?:</{tag}>|\Z)", shown.plain, re.DOTALL):
            shown.stylize(style, *match.span())
    return shown


def _printable(text: str) -> str:
    """`text` with control characters written out: a sample must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else _printable(str(value))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
