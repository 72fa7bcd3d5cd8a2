"""The report of an evaluation: a function of the problems and their samples alone, so that it is the same to the byte
however often the evaluation was stopped, and in whatever order samples came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1mega.benchmark import rating, reference
from r1mega.benchmark.estimates import bootstrap, cons_at_k, consensus, pass_at_k, quantile
from r1mega.benchmark.rows import Problem
from r1mega.benchmark.samples import Graded

_DECIMALS = 6


@dataclass(frozen=True)
class Settings:
    """What a report says of how its samples came about; `extra` is shown as it is."""

    benchmark: str
    model: str
    grader: str
    samples: int
    pass_at: Sequence[int]
    bootstrap: int
    seed: int
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A problem with its samples in the order of their numbers, and the class of each one's answer (None: no votes are
    counted in this benchmark). `measures` are further figures of each sample by name, each in 0 .. 1."""

    problem: Problem
    samples: Sequence[Graded]
    classes: Sequence[int | None] | None = None
    measures: Sequence[Mapping[str, float]] = ()


def build(settings: Settings, asked: Sequence[Asked], contests: Mapping[str, rating.Contest] | None = None, *,
          attempts: int = 1) -> dict[str, Any]:  # fmt: skip
    """The report as plain values; figures are shares of 1, but ratings. `contests` and `attempts`: see `_ratings`.

    A sample whose grading failed counts as wrong, and is counted under `ungraded`.
    """
    samples = [sample for one in asked for sample in one.samples]
    is_graded = settings.grader != "none"
    lengths = [sample.tokens for sample in samples]
    found: dict[str, Any] = {
        "benchmark": settings.benchmark,
        "model": settings.model,
        "problems": len(asked),
        "samples_per_problem": settings.samples,
        "samples": len(samples),
        "metrics": _metrics(settings, asked) if is_graded else {},
        "response_tokens": _lengths(lengths),
        "cut_off": _rounded(sum(sample.cut_off for sample in samples) / len(samples)),
        "no_answer": _rounded(sum(sample.answer is None for sample in samples) / len(samples)) if is_graded else None,
        "ungraded": sum(sample.error is not None for sample in samples),
        "settings": dict(settings.extra) | {"grader": settings.grader, "seed": settings.seed},
    }
    if is_graded:
        found["response_tokens"] |= {
            "mean_right": _mean([s.tokens for s in samples if s.right]),
            "mean_wrong": _mean([s.tokens for s in samples if not s.right]),
        }
    if contests is not None:
        found |= _ratings(asked, contests, attempts)
    found["paper"] = [
        asdict(figure) | {"value": _share(figure)} for figure in reference.of_benchmark(settings.benchmark)
    ]
    found["table"] = [_line(one, is_graded=is_graded) for one in asked]
    return found


def to_json(report: Mapping[str, Any]) -> str:
    """The text of report.json."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _metrics(settings: Settings, asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Name -> value and the bounds of its interval."""
    values = {"pass@1": [sum(sample.score for sample in one.samples) / len(one.samples) for one in asked]}
    for k in settings.pass_at:
        if 1 < k <= settings.samples:
            counts = [(len(one.samples), sum(sample.right for sample in one.samples)) for one in asked]
            values[f"pass@{k}"] = [pass_at_k(number, right, k) for number, right in counts]
    for k in settings.pass_at:
        if 1 < k <= settings.samples and all(one.classes is not None for one in asked):
            values[f"cons@{k}"] = [cons_at_k(one.classes, [s.score for s in one.samples], k) for one in asked]
    for name in dict.fromkeys(name for one in asked for sample in one.measures for name in sample):
        values[name] = [sum(sample[name] for sample in one.measures) / len(one.measures) for one in asked]
    found = {}
    for name, of_problems in values.items():
        low, high = bootstrap(of_problems, settings.bootstrap, settings.seed)
        mean = sum(of_problems) / len(of_problems)
        found[name] = {"value": _rounded(mean), "low": _rounded(low), "high": _rounded(high)}
    return found


def _lengths(lengths: Sequence[int]) -> dict[str, float | None]:
    named = {"p10": 0.1, "median": 0.5, "p90": 0.9}
    return {
        "mean": _mean(lengths),
        **{name: quantile(lengths, share) for name, share in named.items()},
        "max": max(lengths),
    }


def _line(one: Asked, *, is_graded: bool) -> dict[str, Any]:
    samples = one.samples
    found: dict[str, Any] = {
        "id": one.problem.id,
        "mean_tokens": _mean([sample.tokens for sample in samples]),
        "cut_off": sum(sample.cut_off for sample in samples),
    }
    if not is_graded:
        return found
    found |= {
        "pass@1": _rounded(sum(sample.score for sample in samples) / len(samples)),
        "right": sum(sample.right for sample in samples),
        "ungraded": sum(sample.error is not None for sample in samples),
    }
    if not one.problem.tests:
        found["answer"] = one.problem.answer
    if one.classes is not None:
        votes = [number for number in one.classes if number is not None]
        leader = max(dict.fromkeys(votes), key=votes.count, default=None)
        found |= {
            "most_given": None if leader is None else samples[one.classes.index(leader)].answer,
            "votes": 0 if leader is None else votes.count(leader),
            "consensus": _rounded(consensus(one.classes, [sample.score for sample in samples])),
        }
    return found


def _ratings(asked: Sequence[Asked], contests: Mapping[str, rating.Contest], attempts: int) -> dict[str, Any]:
    """Expected rating over the contests: the samples of a problem are handed in in their order, up to `attempts` a go;
    with more samples there are several goes at each contest, whose figures are averaged.

    Raises ValueError where a problem's contest has no standings.
    """
    by_contest: dict[str, list[Asked]] = {}
    for one in asked:
        by_contest.setdefault(one.problem.contest, []).append(one)
    found = {}
    for name, ones in by_contest.items():
        if name not in contests:
            raise ValueError(f"benchmark.standings: no contest {name!r} in it, which {ones[0].problem.id} is of")
        goes = max(1, min(len(one.samples) for one in ones) // attempts)
        rated = []
        for go in range(goes):
            part = slice(go * attempts, (go + 1) * attempts)
            outcomes = {one.problem.index: rating.outcome([s.right for s in one.samples[part]]) for one in ones}
            rated.append(rating.rate(contests[name], outcomes))
        found[name] = {key: _rounded(sum(go[key] for go in rated) / goes) for key in rated[0]}
    mean = {key: _rounded(sum(c[key] for c in found.values()) / len(found)) for key in ("rating", "percentile")}
    return {"rating": mean["rating"], "percentile": _rounded(mean["percentile"] / 100), "contests": found}


def _share(figure: reference.Figure) -> float:
    return figure.value if figure.metric == "rating" else _rounded(figure.value / 100)


def _mean(values: Sequence[float]) -> float | None:
    return _rounded(sum(values) / len(values)) if values else None


def _rounded(value: float) -> float:
    return round(value, _DECIMALS)
