"""report.json and lineage.json of a pipeline, read and checked: what the page is drawn from.

report.json: {"title", "seeds", "seconds", "stages": [{"name", "about", "metrics", "history", "samples"}], "findings":
[{"name", "claim", "value", "baseline", "difference", "interval", "holds", "note"}]}. lineage.json: {"nodes": [{"id",
"kind", "path", "sha256", "stage", "counts"}], "edges": [{"from", "to", "stage"}], "stages": [{"name", "about", "key",
"seconds", "counts", "config"}]}. Shares are shares of 1.

Where several seeds ran, a metric may be an object from seed to number, and a history an object from seed to points,
instead of one number and one list of points. A sample may name its "seed", a finding its "unit" ("share" or "number"),
a stage of the lineage its "code" (an object, as of a version and a commit).
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega.pipeline.page.fields import Fields, PageError, number, points, shown

REPORT_FILE, LINEAGE_FILE = "report.json", "lineage.json"
ALL = ""  # the seed of a value that is not given by seed
Points = tuple[tuple[int, float | None], ...]


@dataclass(frozen=True)
class Sample:
    question: str
    response: str
    reward: float | None
    seed: str


@dataclass(frozen=True)
class Stage:
    """Of the report: `metrics` name -> seed -> value, `history` name -> seed -> points; the seed is ALL where only one
    value is given. A value is None where it was not measured or is not finite."""

    name: str
    about: str
    metrics: Mapping[str, Mapping[str, float | None]]
    history: Mapping[str, Mapping[str, Points]]
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Finding:
    """`holds` None: not decided. `unit` is "share", "number", or None where the page has to tell from the names."""

    name: str
    claim: str
    value: float | None
    baseline: float | None
    difference: float | None
    interval: tuple[float, float] | None
    holds: bool | None
    note: str
    unit: str | None


@dataclass(frozen=True)
class Artifact:
    """A node of the lineage; `stage` is what made it, None where it was given to the pipeline."""

    id: str
    kind: str
    path: str
    sha256: str
    stage: str | None
    counts: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """An edge: `target` was made of `source` by `stage`."""

    source: str
    target: str
    stage: str


@dataclass(frozen=True)
class Work:
    """A stage as the pipeline ran it."""

    name: str
    about: str
    key: str
    seconds: float | None
    counts: Mapping[str, Any]
    config: Any
    code: str | None


@dataclass(frozen=True)
class Page:
    """All that the page shows. `unshown`: keys of the files which it has no place for."""

    title: str
    seeds: Sequence[str]
    seconds: float | None
    stages: Sequence[Stage]
    findings: Sequence[Finding]
    artifacts: Sequence[Artifact]
    made: Sequence[Made]
    works: Sequence[Work]
    digests: Mapping[str, str] = field(default_factory=dict)
    unshown: Sequence[str] = ()


def read(run_dir: Path) -> Page:
    """Read both files of `run_dir`. Raises PageError at the first thing that is not as it must be."""
    if not run_dir.is_dir():
        raise PageError(f"{run_dir} is not a directory; give the run.dir of an `r1mega pipeline`")
    unshown: list[str] = []
    report, report_digest = _load(run_dir / REPORT_FILE, unshown)
    lineage, lineage_digest = _load(run_dir / LINEAGE_FILE, unshown)
    artifacts, made, works = _lineage(lineage)
    page = Page(
        title=report.text("title"),
        seeds=[shown(seed) for seed in report.sequence("seeds", "a list of integers", int)],
        seconds=report.number("seconds"),
        stages=_unique([_stage(one) for one in report.objects("stages")], "name", report, "stages"),
        findings=[_finding(one) for one in report.objects("findings")],
        artifacts=artifacts,
        made=made,
        works=works,
        digests={REPORT_FILE: report_digest, LINEAGE_FILE: lineage_digest},
        unshown=unshown,
    )
    report.done()
    lineage.done()
    return page


def _load(path: Path, unshown: list[str]) -> tuple[Fields, str]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        command = f"`r1mega pipeline ... run.dir={path.parent}` writes it when its stages are done"
        raise PageError(f"{path} is not there; {command}") from None
    except OSError as error:
        raise PageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PageError(f"{path} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PageError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise PageError(f"{path}: got {shown(found)}; expected an object")
    return Fields(path, "", found, unshown), hashlib.sha256(content).hexdigest()


def _stage(one: Fields) -> Stage:
    stage = Stage(
        name=one.text("name"),
        about=one.text("about"),
        metrics=one.mapping("metrics", lambda at, value: _by_seed(one, at, value)),
        history=one.mapping("history", lambda at, value: _points_by_seed(one, at, value)),
        samples=[_sample(sample) for sample in one.objects("samples", default=())],
    )
    one.done()
    return stage


def _by_seed(one: Fields, at: str, value: Any) -> dict[str, float | None]:
    expected = "a number, null, or an object from seed to number"
    given = value if isinstance(value, dict) else {ALL: value}
    return {seed: number(one, f"{at}.{seed}".rstrip("."), each, expected) for seed, each in given.items()}


def _points_by_seed(one: Fields, at: str, value: Any) -> dict[str, Points]:
    given = value if isinstance(value, dict) else {ALL: value}
    return {seed: points(one, f"{at}.{seed}".rstrip("."), each) for seed, each in given.items()}


def _sample(one: Fields) -> Sample:
    seed = one.take("seed", None)
    sample = Sample(one.text("question"), one.text("response"), one.number("reward"), "" if seed is None else str(seed))
    one.done()
    return sample


def _finding(one: Fields) -> Finding:
    holds = one.take("holds")
    if holds is not None and not isinstance(holds, bool):
        one.fail("holds", holds, "true, false, or null where it is not decided")
    unit = one.text("unit", None)
    if unit not in (None, "share", "number"):
        one.fail("unit", unit, '"share" or "number"')
    finding = Finding(
        name=one.text("name"),
        claim=one.text("claim"),
        value=one.number("value"),
        baseline=one.number("baseline"),
        difference=one.number("difference"),
        interval=_interval(one),
        holds=holds,
        note=one.text("note", None) or "",
        unit=unit,
    )
    one.done()
    return finding


def _interval(one: Fields) -> tuple[float, float] | None:
    given = one.take("interval", None)
    if given is None:
        return None
    expected = "null, or [low, high], two numbers in this order"
    if not isinstance(given, list) or len(given) != 2:
        one.fail("interval", given, expected)
    low, high = (number(one, f"interval[{index}]", each, expected) for index, each in enumerate(given))
    if low is None or high is None:
        return None
    if low > high:
        one.fail("interval", given, expected)
    return low, high


def _lineage(lineage: Fields) -> tuple[list[Artifact], list[Made], list[Work]]:
    artifacts = _unique([_artifact(one) for one in lineage.objects("nodes")], "id", lineage, "nodes")
    known = {artifact.id for artifact in artifacts}
    made = []
    for one in lineage.objects("edges"):
        for end in ("from", "to"):
            if one.text(end) not in known:
                one.fail(end, one.text(end), "the id of one of the nodes")
        made.append(Made(one.text("from"), one.text("to"), one.text("stage")))
        one.done()
    graph: dict[str, list[str]] = {}
    for edge in made:
        graph.setdefault(edge.target, []).append(edge.source)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        lineage.fail("edges", " -> ".join(reversed(error.args[1])), "no artifact made of itself")
    works = _unique([_work(one) for one in lineage.objects("stages")], "name", lineage, "stages")
    return artifacts, made, works


def _artifact(one: Fields) -> Artifact:
    artifact = Artifact(
        id=one.text("id"),
        kind=one.text("kind"),
        path=one.text("path"),
        sha256=one.text("sha256"),
        stage=one.text("stage", None),
        counts=one.mapping("counts"),
    )
    one.done()
    return artifact


def _work(one: Fields) -> Work:
    work = Work(
        name=one.text("name"),
        about=one.text("about"),
        key=one.text("key"),
        seconds=one.number("seconds"),
        counts=one.mapping("counts"),
        config=one.take("config", None),
        code=" ".join(str(part) for part in one.mapping("code").values() if part is not None) or None,
    )
    one.done()
    return work


def _unique(ones: list[Any], key: str, fields: Fields, at: str) -> list[Any]:
    seen: set[str] = set()
    for index, one in enumerate(ones):
        name = getattr(one, key)
        if name in seen:
            fields.fail(f"{at}[{index}].{key}", name, "a name that no other has")
        seen.add(name)
    return ones


def mean(values: Mapping[str, float | None]) -> float | None:
    """The mean over the seeds that have a value; None where none has."""
    known = [value for value in values.values() if value is not None]
    return math.fsum(known) / len(known) if known else None
