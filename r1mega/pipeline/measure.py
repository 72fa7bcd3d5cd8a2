"""What a stage that is done has measured: its metrics, how they came, and some of its samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from r1mega.config.check_pipeline import outputs_of
from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.metrics.history import METRICS_FILE, read_metrics, series
from r1mega.metrics.jsonl import read_jsonl
from r1mega.pipeline.files import read_json
from r1mega.pipeline.stage import Stage

MAX_POINTS, MAX_SAMPLES = 400, 8
# Of a run's metrics those that say how fast it was, not what it learned.
_OF_THE_MACHINE = ("time/", "perf/", "memory/")


def metrics_of(stage: Stage) -> dict[str, float]:
    """Name -> value: of a training the last value of each metric, of an evaluation pass_at_1, pass_at_K, cons_at_K,
    response_tokens, cut_off and no_answer; else the numbers in outputs of kind `report` (those under `metrics`, or all
    of the top level)."""
    if stage.spec.run is StageRun.evaluate:
        return _of_evaluation(read_json(stage.dir / "report.json") or {})
    found = {name: points[-1][1] for name, points in history_of(stage).items()}
    for name, output in outputs_of(stage.spec).items():
        if output.kind is ArtifactKind.report:
            said = read_json(stage.output(name))
            found |= _numbers(said.get("metrics", said) if isinstance(said, Mapping) else {})
    return found


def history_of(stage: Stage) -> dict[str, list[list[float]]]:
    """Metric -> [[update, value], ...] of a training, evenly thinned out; empty of other stages."""
    path = stage.dir / METRICS_FILE
    if stage.spec.run is not StageRun.train or not path.exists():
        return {}
    records = read_metrics(path)
    names = dict.fromkeys(name for record in records for name in record)
    found = {}
    for name in names:
        if name in ("update", "round", "time") or name.startswith(_OF_THE_MACHINE):
            continue
        updates, values = series(records, name)
        if values:
            found[name] = _thinned([[update, value] for update, value in zip(updates, values, strict=True)])
    return found


def samples_of(stage: Stage) -> list[dict[str, Any]]:
    """Some samples: the first problems of an evaluation; the first rows of outputs of kind `samples`; else the last
    ones of a training, on held-out questions where there are any."""
    if stage.spec.run is StageRun.evaluate:
        return _of_problems(stage.dir)
    paths = [stage.output(name) for name, one in outputs_of(stage.spec).items() if one.kind is ArtifactKind.samples]
    paths += [stage.dir / "samples.jsonl"] if stage.spec.run is StageRun.train else []
    for path in paths:
        if path.is_file() and path.suffix == ".jsonl" and (found := _of_file(path)):
            return found
    return []


def _of_evaluation(report: Mapping[str, Any]) -> dict[str, float]:
    found = {name.replace("@", "_at_"): one["value"] for name, one in report.get("metrics", {}).items()}
    if "response_tokens" in report:
        found["response_tokens"] = report["response_tokens"]["mean"]
    return found | {name: report[name] for name in ("cut_off", "no_answer", "rating") if report.get(name) is not None}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        str(name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _thinned(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _of_problems(run_dir: Path) -> list[dict[str, Any]]:
    if not (run_dir / "samples.jsonl").exists() or not (run_dir / "benchmark.jsonl").exists():
        return []
    questions = [row.get("prompt", "") for _, row in islice(read_jsonl(run_dir / "benchmark.jsonl"), MAX_SAMPLES)]
    first = {row["problem"]: row for _, row in read_jsonl(run_dir / "samples.jsonl") if row["sample"] == 0}
    return [
        {"question": question, "response": first[place]["text"], "reward": first[place]["score"]}
        for place, question in enumerate(questions)
        if place in first
    ]


def _of_file(path: Path) -> list[dict[str, Any]]:
    rows = list(_rows(path))
    held_out = [row for row in rows if row.get("split") not in (None, "train")]
    of_run = held_out or rows
    newest = max((row.get("update", 0) for row in of_run), default=0)
    chosen = [row for row in of_run if row.get("update", 0) == newest][:MAX_SAMPLES]
    return [
        {
            "question": _first(row, "question", "prompt"),
            "response": _first(row, "response", "text"),
            "reward": _first(row, "reward", "score"),
        }
        for row in chosen
    ]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if name in row), None)
