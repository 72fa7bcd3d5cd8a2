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
from r1mega.pipeline.stage import Stage

REPORT_FILE = "report.json"
_DECIMALS = 6
Measured = Mapping[str, Mapping[str, float]]  # stage -> metric -> value


def write(root: Path, pipeline: PipelineConfig, walks: Sequence[Walk]) -> Path:
    """Write report.json of the stages that are done."""
    write_json(root / REPORT_FILE, build(pipeline, walks))
    return root / REPORT_FILE


def build(pipeline: PipelineConfig, walks: Sequence[Walk]) -> dict[str, Any]:
    """`walks` are those of the seeds, in their order. Metrics are means over the seeds that have them; history is by
    seed where there are several; samples are the first seed's."""
    by_seed = [{name: metrics_of(walk.stages[name]) for name in walk.done} for walk in walks]
    seconds = sum(manifest["seconds"] for walk in walks for manifest in walk.done.values())
    first = walks[0]
    return {
        "title": pipeline.title,
        "seeds": [next(iter(walk.stages.values())).place.seed for walk in walks],
        "seconds": round(seconds, 3),
        "stages": [
            {
                "name": name,
                "about": stage.spec.about,
                "metrics": _means([measured[name] for measured in by_seed if name in measured]),
                "history": _histories([walk.stages[name] for walk in walks if name in walk.done]),
                "samples": samples_of(stage),
            }
            for name, stage in first.stages.items()
            if name in first.done
        ],
        "findings": [finding(name, claimed, by_seed) for name, claimed in pipeline.findings.items()],
    }


def _histories(stages: Sequence[Stage]) -> dict[str, Any]:
    """Metric -> points of one stage; where several seeds ran it metric -> seed -> points."""
    found = {stage.place.seed: history_of(stage) for stage in stages}
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
        notes.append(f"95% interval of the mean difference over {len(pairs)} seeds (Student's t)")
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


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in found for name in one)
    values = {name: [one[name] for one in found if name in one] for name in names}
    return {name: _rounded(sum(some) / len(some)) for name, some in values.items()}


def _rounded(value: float) -> float:
    return round(value, _DECIMALS)
