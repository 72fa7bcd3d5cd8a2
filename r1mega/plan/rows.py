"""How many rows a run will read: of the file where it is there, else as the configuration or the published set says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from r1mega.config.choices import Loop
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

# Problems of the sets that benchmark= names and whose size is part of their name or was published with them.
_KNOWN = {"aime2024": 30, "aime2025": 30, "math500": 500, "gpqa_diamond": 198}


def rows_of(config: Config) -> int | None:
    """Rows of data.train, or problems of the benchmark; None where nothing tells."""
    benchmark, is_evaluation = config.benchmark, config.stage.loop is Loop.evaluate
    path = benchmark.data if is_evaluation else config.data.train
    if path and Path(path).is_file():
        count: int | None = _lines(path)
    else:
        count = config.plan.rows
        if count is None and is_evaluation:
            count = _KNOWN.get(benchmark.name)
    if count is not None and is_evaluation and benchmark.limit is not None:
        count = min(count, benchmark.limit)
    return count


def missing(config: Config) -> list[Fault]:
    """The fault of a run whose length follows from rows that nothing tells."""
    if config.stage.loop not in (Loop.reward_model, Loop.evaluate) or rows_of(config):
        return []
    field = "benchmark.data" if config.stage.loop is Loop.evaluate else "data.train"
    constraint = f"the length of the run follows from its rows, and {field} is not a file with rows here"
    return [Fault("plan.rows", str(config.plan.rows or "nothing"), constraint, f"set plan.rows, or {field}=FILE.jsonl")]


@cache
def _lines(path: str) -> int:
    """Lines of a file that are not blank."""
    with open(path, encoding="utf-8") as lines:
        return sum(1 for line in lines if line.strip())
