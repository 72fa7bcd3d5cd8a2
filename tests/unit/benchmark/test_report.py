"""A report worked out by hand from its samples; the file they are kept in; the paper's figures."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from r1mega.benchmark import reference, report, show
from r1mega.benchmark.rating import Contest, Entry
from r1mega.benchmark.rows import Problem
from r1mega.benchmark.samples import Graded, SampleFile

SETTINGS = report.Settings("aime2024", "DIR", "math", 4, (1, 2, 4), 200, 0, {"temperature": 0.6})


def graded(problem: int, sample: int, score: float, answer: str | None = "1", **other) -> Graded:
    return Graded(problem, sample, f"p{problem}", score, answer, other.pop("tokens", 10), False, **other)


def asked() -> list[report.Asked]:
    first = [graded(0, 0, 1, "5"), graded(0, 1, 0, "6"), graded(0, 2, 1, "5"), graded(0, 3, 0, None, tokens=50)]
    second = [graded(1, 0, 0, "7"), graded(1, 1, 0, "7"), graded(1, 2, 1, "8"), graded(1, 3, 0, "9", error="time")]
    return [
        report.Asked(Problem("p0", "?", "5"), first, [0, 1, 0, None]),
        report.Asked(Problem("p1", "?", "8"), second, [0, 0, 1, 2]),
    ]


def test_the_figures() -> None:
    found = report.build(SETTINGS, asked())
    metrics = {name: entry["value"] for name, entry in found["metrics"].items()}
    # pass@1: (2/4 + 1/4) / 2. pass@2: ((1 - 1/6) + (1 - 3/6)) / 2. pass@4: both. cons@4: 5 is right, 7 is wrong.
    # cons@2: p0 {5,6}: 1/2, {5,none}: 1 -> 3/4; p1 {7,7}: 0, {8,9}: 1/2 -> 1/4.
    expected = {"pass@1": 0.375, "pass@2": 2 / 3, "pass@4": 1.0, "cons@2": 0.5, "cons@4": 0.5}
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert found["response_tokens"]["mean"] == 15.0 and found["response_tokens"]["max"] == 50
    assert (found["ungraded"], found["no_answer"]) == (1, 0.125)
    lines = found["table"]
    assert (lines[1]["most_given"], lines[1]["votes"], lines[1]["consensus"]) == ("7", 2, 0.0)
    assert (lines[0]["answer"], lines[0]["right"], lines[0]["pass@1"]) == ("5", 2, 0.5)
    assert {figure["model"]: figure["value"] for figure in found["paper"]}["DeepSeek-R1"] == 0.798


def test_it_is_shown(tmp_path) -> None:
    found = report.build(SETTINGS, asked())
    out = io.StringIO()
    show.show(found, Console(file=out, width=140))
    assert "37.5 [" in out.getvalue() and "R1-Distill-Qwen-7B" in out.getvalue() and "55.5" in out.getvalue()
    show.plot(found, [1, 2, 3], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_responses_that_nothing_grades_have_lengths_alone() -> None:
    settings = report.Settings("alpaca_eval2", "DIR", "none", 1, (1,), 10, 0, {})
    found = report.build(settings, [report.Asked(Problem("p0", "?", ""), [graded(0, 0, 0.0, None)])])
    assert found["metrics"] == {} and found["no_answer"] is None and found["samples"] == 1
    show.show(found, Console(file=io.StringIO()))


def test_a_rating_is_the_mean_over_contests_and_goes() -> None:
    contest = Contest("7", "points", {"A": 500}, [Entry(1500, points) for points in (400, 450, 500, 0)])
    problem = Problem("7A", "?", "", tests=({},), contest="7", index="A")
    settings = report.Settings("codeforces", "DIR", "code", 4, (1,), 10, 0, {})
    # Two goes of two samples. Solved at the second: 450 points, behind 500 and its tie, so place 3 of 5: all are
    # expected to tie, 1500. Never solved: place 5, the lowest rating there is.
    one = report.Asked(problem, [graded(0, i, score, None) for i, score in enumerate([0, 1, 0, 0])])
    found = report.build(settings, [one], {"7": contest}, attempts=2)
    assert found["contests"]["7"]["place"] == (3 + 5) / 2
    assert found["rating"] == pytest.approx((1500 + 0) / 2, abs=1e-3)
    assert report.build(settings, [one], {"7": contest}, attempts=4)["rating"] == pytest.approx(1500, abs=1e-3)
    with pytest.raises(ValueError, match="no contest '7'"):
        report.build(settings, [one], {}, attempts=2)


def test_samples_are_kept_in_any_order_and_a_torn_line_is_cut_off(tmp_path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = [graded(i, j, float(j == 0), text="a\nü\u2028b") for i in range(3) for j in range(2)]
    shuffled = random.Random(0).sample(samples, 6)
    with SampleFile(path) as file:
        for sample in shuffled[:4]:
            file.add(sample)
    with path.open("a") as torn:
        torn.write(json.dumps(asdict(shuffled[4]))[:20])
    with SampleFile(path) as file:
        assert len(file.samples) == 4
        for sample in shuffled:
            file.add(sample)
        file.add(graded(0, 0, 0.5))  # the first of each counts
        assert file.ordered() == samples
    with SampleFile(path) as file:
        assert file.ordered() == samples
    path.write_text('{"problem": 1}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl:1: not a sample"):
        SampleFile(path)


def test_the_papers_figures() -> None:
    found = {(f.model, f.benchmark, f.metric, f.table): f.value for f in reference.figures()}
    assert found["DeepSeek-R1-Zero", "aime2024", "pass@1", "Table 2"] == 71.0
    assert found["DeepSeek-R1-Zero", "aime2024", "pass@1", "Table 3"] == 77.9
    assert found["DeepSeek-R1", "c_simpleqa", "pass@1", "Table 4"] == 63.7
    assert found["DeepSeek-R1-Distill-Llama-70B", "codeforces", "rating", "Table 5"] == 1633
    assert found["DeepSeek-R1-Zero-Qwen-32B", "livecodebench", "pass@1", "Table 6"] == 40.2
    assert {figure.table for figure in reference.figures()} == {f"Table {i}" for i in range(2, 7)}
    # Where two tables report a model on the same benchmark they agree, but for what is known to differ.
    known = {("DeepSeek-R1-Zero", "aime2024"), ("DeepSeek-R1-Zero", "gpqa_diamond")}
    known |= {("Claude-3.5-Sonnet-1022", "livecodebench"), ("GPT-4o-0513", "livecodebench")}
    values: dict[tuple[str, str, str], set[float]] = {}
    for figure in reference.figures():
        values.setdefault((figure.model, figure.benchmark, figure.metric), set()).add(figure.value)
    assert {key[:2] for key, several in values.items() if len(several) > 1} == known


def test_further_measures_are_means_over_problems_with_an_interval() -> None:
    first, second = asked()
    of_first = [{"readable": value} for value in (1.0, 1.0, 0.0, 0.0)]
    of_second = [{"readable": value} for value in (1.0, 0.0, 0.0, 0.0)]
    found = report.build(SETTINGS, [replace(first, measures=of_first), replace(second, measures=of_second)])
    entry = found["metrics"]["readable"]
    assert entry["value"] == 0.375 and 0.25 <= entry["low"] <= entry["high"] <= 0.5
    assert "readable" not in report.build(SETTINGS, asked())["metrics"]
