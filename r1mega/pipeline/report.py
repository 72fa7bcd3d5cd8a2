"""report.json: what the stages of a pipeline measured, over its seeds, and whether what it claims holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.choices import Direction
from r1mega.config.schema_pipeline import PipelineConfig, PipelineFinding
from r1mega.pipeline.files import write_json
from r1mega.pipeline.measure import history_of, metrics_of, samples_of
from r1mega.pipeline.runner import Walk

REPORT_FILE = "report.json"
_DECIMALS = 6
Measured = Mapping[str, Mapping[str, float]]  # stage -> metric -> value


def write(root: Path, pipeline: PipelineConfig, walks: Sequence[Walk]) -> Path:
    """Write report.json of the stages that are done."""
    write_json(root / REPORT_FILE, build(pipeline, walks))
    return root / REPORT_FILE


def build(pipeline: PipelineConfig, walks: Sequence[Walk]) -> dict[str, Any]:
    """`walks` are those of the seeds, in their order. Metrics and history are by seed where there are several; samples
    are the first seed's."""
    by_seed = {next(iter(walk.stages.values())).place.seed: walk for walk in walks}
    measured = {seed: {name: metrics_of(walk.stages[name]) for name in walk.done} for seed, walk in by_seed.items()}
    seconds = sum(manifest["seconds"] for walk in walks for manifest in walk.done.values())
    first = walks[0]
    return {
        "title": pipeline.title,
        "seeds": list(by_seed),
        "seconds": round(seconds, 3),
        "stages": [
            {
                "name": name,
                "about": stage.spec.about,
                "metrics": _of_seeds({seed: _all_rounded(measured[seed].get(name, {})) for seed in by_seed}),
                "history": _of_seeds(
                    {seed: history_of(walk.stages[name]) for seed, walk in by_seed.items() if name in walk.done}
                ),
                "samples": samples_of(stage),
            }
            for name, stage in first.stages.items()
            if name in first.done
        ],
        "findings": [finding(name, claimed, list(measured.values())) for name, claimed in pipeline.findings.items()],
    }


def _of_seeds(found: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Metric -> what one stage has of it; where several seeds ran it metric -> seed -> that."""
    if len(found) == 1:
        return next(iter(found.values()))
    metrics = dict.fromkeys(metric for one in found.values() for metric in one)
    return {metric: {str(seed): one[metric] for seed, one in found.items() if metric in one} for metric in metrics}


def finding(name: str, claimed: PipelineFinding, by_seed: Sequence[Measured]) -> dict[str, Any]:
    """A claim beside the figures. It holds where the difference, in the direction claimed, is above the margin; with
    several seeds, where the whole 95% interval (Student's t) of the mean paired difference is. `holds` is null where a
    figure is missing."""
    pairs = [pair for measured in by_seed if (pair := _pair(claimed, measured)) is not None]
    found: dict[str, Any] = {"name": name, "claim": claimed.claim}
    notes = [claimed.note] if claimed.note else []
    if len(pairs) < len(by_seed):
        missing = len(by_seed) - len(pairs)
        notes.append(f"not measured in {missing} of {len(by_seed)} seeds: {_wanted(claimed)}")
    if not pairs:
        empty = dict.fromkeys(("value", "baseline", "difference", "interval", "holds"))
        return found | empty | {"note": "; ".join(notes)}
    value, baseline = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    differences = [one - other for one, other in pairs]
    sign = 1.0 if claimed.direction is Direction.higher else -1.0
    interval = None
    least = sign * differences[0]
    if len(pairs) > 1:
        from r1mega.benchmark.estimates import student_interval  # numpy

        low, high = student_interval(differences)
        interval = [_rounded(low), _rounded(high)]
        least = min(sign * low, sign * high)
        alone = sum(sign * difference > claimed.margin for difference in differences)
        notes.append(f"so in {alone} of {len(pairs)} seeds; 95% interval of their mean difference (Student's t)")
    else:
        notes.append("one seed: nothing is said of the spread over seeds")
    if claimed.margin:
        notes.append(f"claimed is a difference {claimed.direction} by more than {claimed.margin:g}")
    return found | {
        "value": _rounded(value),
        "baseline": _rounded(baseline),
        "difference": _rounded(value - baseline),
        "interval": interval,
        "holds": least > claimed.margin if len(pairs) == len(by_seed) else None,
        "note": "; ".join(notes),
    }


def _pair(claimed: PipelineFinding, measured: Measured) -> tuple[float, float] | None:
    value = measured.get(claimed.stage, {}).get(claimed.metric)
    baseline = measured.get(claimed.baseline, {}).get(claimed.baseline_metric or claimed.metric)
    return None if value is None or baseline is None else (value, baseline)


def _wanted(claimed: PipelineFinding) -> str:
    other = claimed.baseline_metric or claimed.metric
    return f"{claimed.metric} of {claimed.stage}, or {other} of {claimed.baseline}"


def _all_rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in values.items()}


def _rounded(value: float) -> float:
    return round(value, _DECIMALS)
