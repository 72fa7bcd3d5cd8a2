"""Runs as jobs of a real Slurm: to the end over two nodes, cancelled, preempted, at the end of their time, less a node.

Runs that are stopped are long enough to be so; that nothing is lost shows in metrics.jsonl, where every update is once,
and in the numbers themselves, which are those of the run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cluster import wait_for
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SOON = 400.0  # of a run whose processes share two cores with others
UPDATES = 40
LONG = (f"algo.updates={UPDATES}", "checkpoint.every=10")


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl less what a clock says."""
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(("time", "perf/", "memory/"))}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert metrics_of(run_dir) == metrics_of(expected)
    ours, theirs = load_file(run_dir / "hf" / "model.safetensors"), load_file(expected / "hf" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """The run that nobody stops. Its job is queued with every check."""
    job = runs.job("whole", *LONG, quick=False)
    state = runs.cluster.wait_for_state(job, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], 300)
    assert state == "COMPLETED", runs.output("whole")
    return runs.place / "whole"


def test_a_run_over_two_nodes_to_its_end(runs, whole) -> None:
    assert runs.updates("whole") == list(range(1, UPDATES + 1))
    said = runs.output("whole")
    assert "health check: n1: fit" in said and "health check: n2: fit" in said
    assert said.rstrip().endswith("r1mega: the run has reached its end")
    start = next((whole / "slurm").glob("job-*.0"))
    assert [(start / f"rank{rank}.started").read_text() for rank in range(2)] == ["n1", "n2"]
    assert [(start / f"rank{rank}.ended").read_text() for rank in range(2)] == ["0", "0"]
    assert (whole / "logs" / "rank1.log").exists()
    moved = load_file(whole / "hf" / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(moved, torch.ones_like(moved)), "a run that changes nothing proves little"


def test_a_job_that_is_preempted_and_then_comes_to_its_time_limit(runs, whole) -> None:
    """Of a preemption Slurm tells the tasks alone, by SIGTERM, and waits for the grace time of the partition; near the
    time limit it tells the job's script alone, by the signal of --signal=B:USR1."""
    job = runs.job("asked", *LONG, "slurm.partition=low")
    wait_for(lambda: len(runs.updates("asked")) >= 2, SOON, "two updates")
    urgent = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = runs.cluster.ask(*urgent, "--wrap=sleep 1")
    assert runs.cluster.wait_for_state(other, ["COMPLETED", "FAILED"], 90) == "COMPLETED"
    said = runs.output("asked")
    assert "asked to stop by SIGTERM to rank" in said and "the job is queued again" in said
    first = saved_last(runs, "asked")

    wait_for(lambda: len(runs.updates("asked")) >= first + 2, SOON, "two updates more")
    runs.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: runs.output("asked").count("the job is queued again") == 2, 60, "a second requeue")
    said = runs.output("asked")
    assert "asked to stop by SIGUSR1 to the job; a checkpoint is written; the job is queued again" in said
    second = saved_last(runs, "asked")
    assert first < second < UPDATES

    runs.cluster.wait_for_state(job, ["COMPLETED"], SOON)
    for start, update in enumerate((first, second), start=1):
        goes_on = f"start {start}, on n1 n2: goes on from {runs.place}/asked/checkpoints/update-{update:06d}"
        assert goes_on in runs.output("asked")
    assert_same_run(runs.place / "asked", whole)


def saved_last(runs, name: str) -> int:
    """The update of the newest checkpoint, which is the last one that the run has done."""
    done = runs.updates(name)
    assert done == list(range(1, done[-1] + 1))
    assert (runs.place / name / "checkpoints" / f"update-{done[-1]:06d}" / "manifest.json").exists()
    return done[-1]


def test_a_job_that_loses_a_node_and_is_then_cancelled(runs, whole) -> None:
    """It goes on by itself after the first, from the last checkpoint; after the second when it is submitted again."""
    job = runs.job("lost", *LONG)
    again = runs.submit("lost", *LONG, "run.resume=true")
    assert again.returncode == 2 and f"job {job} of this run is" in again.stderr
    checkpoints = runs.place / "lost" / "checkpoints"
    wait_for(lambda: (checkpoints / "update-000010" / "manifest.json").exists(), SOON, "a checkpoint")
    runs.cluster.lose_node("n2")
    wait_for(lambda: "the job is queued again" in runs.output("lost"), 240, "a requeue")
    assert "lost n2; the job is queued again" in runs.output("lost")
    runs.cluster.start_node("n2")
    goes_on = f"start 1, on n1 n2: goes on from {checkpoints}/update-0000"
    wait_for(lambda: goes_on in runs.output("lost"), 240, "a start")

    wait_for(lambda: (checkpoints / "update-000020" / "manifest.json").exists(), SOON, "another checkpoint")
    runs.cluster.ask("scancel", job)
    assert runs.cluster.wait_for_state(job, ["CANCELLED", "COMPLETED"], 30) == "CANCELLED"
    wait_for(lambda: not runs.cluster.ask("squeue", "-h"), 60, "an empty queue")
    assert not [words for words in runs.cluster.tasks() if "r1mega" in words], "processes of the run live on"
    assert runs.output("lost").count("the job is queued again") == 1

    runs.cluster.wait_for_state(runs.job("lost", *LONG, "run.resume=true"), ["COMPLETED"], SOON)
    assert_same_run(runs.place / "lost", whole)


@pytest.mark.extended
def test_the_time_limit_itself(runs) -> None:
    """Two minutes, with a warning one minute before, as Slurm's clock has it; then the run goes on."""
    endless = ("algo.updates=100000", "checkpoint.every=10", "slurm.time_limit='2'", "slurm.signal_seconds=60")
    job = runs.job("limited", *endless)
    wait_for(lambda: "the job is queued again" in runs.output("limited"), 150, "the warning")
    assert "asked to stop by SIGUSR1 to the job; a checkpoint is written" in runs.output("limited")
    last = saved_last(runs, "limited")
    wait_for(lambda: len(runs.updates("limited")) > last, SOON, "updates after it")
    runs.cluster.ask("scancel", job)
    assert runs.updates("limited")[: last + 1] == list(range(1, last + 2))
