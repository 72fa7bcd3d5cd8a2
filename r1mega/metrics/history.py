"""Reading back what a run has measured."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from r1mega.metrics.catalog import TIME_PREFIX
from r1mega.metrics.jsonl import read_jsonl

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order: `update` and `round` (ints), `time` (seconds), metrics (floats).

    Names listed under `nonfinite` come back as NaN. Raises FileNotFoundError, and ValueError naming file and line where
    a line is not a JSON object or lacks an integer `update` or `round`.
    """
    records = []
    for number, record in read_jsonl(path):
        for key in ("update", "round"):
            if type(record.get(key)) is not int:
                raise ValueError(f"{path}:{number}: {key} is {record.get(key)!r}, expected an integer")
        for name in record.pop("nonfinite", []):
            record[name] = math.nan
        records.append(record)
    return records


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Updates (ascending) and finite values of one metric.

    Where an update stands more than once, as after a restart from an earlier checkpoint, the later record counts.
    """
    by_update = {record["update"]: float(record[name]) for record in records if record.get(name) is not None}
    points = [(update, value) for update, value in sorted(by_update.items()) if math.isfinite(value)]
    return [update for update, _ in points], [value for _, value in points]


def phase_seconds(records: Sequence[dict[str, Any]]) -> tuple[str, list[int], dict[str, list[float]]]:
    """What one step is ("round", or "update" in a run without rounds), its last update, and the seconds of each phase.

    `time/` metrics are the seconds of a whole step; where several records of a step carry them the last one counts.
    Steps that report none are left out; a phase that did not run in a step took 0 seconds there.
    """
    unit = "round" if any(record["round"] for record in records) else "update"
    by_step: dict[int, dict[str, float]] = {}
    last_update: dict[int, int] = {}
    for record in records:
        times = {
            name.removeprefix(TIME_PREFIX): float(value)
            for name, value in record.items()
            if name.startswith(TIME_PREFIX) and value is not None and math.isfinite(value)
        }
        if times:
            by_step.setdefault(record[unit], {}).update(times)
            last_update[record[unit]] = record["update"]
    steps = sorted(by_step)
    phases = dict.fromkeys(phase for step in steps for phase in by_step[step])
    return (
        unit,
        [last_update[step] for step in steps],
        {phase: [by_step[step].get(phase, 0.0) for step in steps] for phase in phases},
    )
