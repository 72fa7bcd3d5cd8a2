"""Rules of `r1mega evaluate`: what is asked, where it comes from, what grades it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.choices import GraderName
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

BENCHMARK_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("benchmark.max_prompt_tokens", ((">=", 1),)),
    ("benchmark.samples", ((">=", 1),)),
    ("benchmark.temperature", ((">=", 0),)),
    ("benchmark.top_p", ((">", 0), ("<=", 1))),
    ("benchmark.max_tokens", ((">=", 1),)),
    ("benchmark.limit", ((">=", 1),)),
    ("benchmark.bootstrap", ((">=", 1),)),
    ("benchmark.attempts", ((">=", 1),)),
)


def check_benchmark(config: Config) -> Iterator[Fault]:
    """Faults of the section `benchmark`."""
    benchmark = config.benchmark
    if not benchmark.name:
        yield Fault("benchmark", "nothing", "must say what is asked", "choose an option: benchmark=aime2024")
        return
    if benchmark.grader in (GraderName.judge, GraderName.harness):
        yield _graded_elsewhere(config)
        return
    yield from _check_source(config)
    if benchmark.readability and benchmark.grader is GraderName.none:
        constraint = "is reported beside grades, and benchmark.grader=none gives none"
        yield Fault("benchmark.readability", "true", constraint, "set it to false or choose a grader")
    if any(k < 1 for k in benchmark.pass_at):
        constraint = "every k must be at least 1"
        yield Fault("benchmark.pass_at", str(list(benchmark.pass_at)), constraint, "take the others out")
    if benchmark.standings is not None and not Path(benchmark.standings).is_file():
        constraint = "must be a JSONL file of contests and their standings"
        yield Fault("benchmark.standings", benchmark.standings, constraint, "correct the path, or set it to null")


def _graded_elsewhere(config: Config) -> Fault:
    """Why this benchmark is not graded here, and how it is."""
    benchmark = config.benchmark
    if benchmark.grader is GraderName.judge:
        remedy = f"keep the responses with benchmark.grader=none, then run: {benchmark.harness}"
        return Fault("benchmark.grader", "judge", f"{benchmark.name} is graded by {benchmark.judge}", remedy)
    constraint = f"{benchmark.name} is run by {benchmark.judge}"
    return Fault("benchmark.grader", "harness", constraint, f"run it there: {benchmark.harness}")


def _check_source(config: Config) -> Iterator[Fault]:
    """The problems are in a file, or can be asked of the hub."""
    benchmark = config.benchmark
    if benchmark.data is not None:
        if not Path(benchmark.data).is_file():
            constraint = "must be a JSONL file of the benchmark's problems"
            yield Fault("benchmark.data", benchmark.data, constraint, "correct the path")
        return
    if benchmark.hub is None:
        constraint = f"{benchmark.name} has no set on the hub"
        yield Fault("benchmark.data", "nothing", constraint, "set benchmark.data=FILE.jsonl")
    elif importlib.util.find_spec("datasets") is None:
        constraint = (
            f"{benchmark.name} comes from {benchmark.hub} on the Hugging Face hub, and datasets is not installed"
        )
        remedy = "install it (pip install datasets), or set benchmark.data=FILE.jsonl"
        yield Fault("benchmark.data", "nothing", constraint, remedy)
