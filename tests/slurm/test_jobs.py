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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SOON = 150.0  # until a job's ranks have come to their first updates, on a busy machine
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


def test_what_slurm_warns_of_before_the_time_limit_is_a_checkpoint_and_a_requeue(runs, whole) -> None:
    """The signal of --signal=B:USR1, which Slurm sends to the job's script alone."""
    job = runs.job("warned", *LONG)
    wait_for(lambda: len(runs.updates("warned")) >= 2, SOON, "two updates")
    runs.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: "the job is queued again" in runs.output("warned"), 60, "a requeue")
    said = runs.output("warned")
    assert "asked to stop by SIGUSR1 to the job; a checkpoint is written; the job is queued again" in said
    stopped = runs.updates("warned")
    assert stopped == list(range(1, stopped[-1] + 1)) and stopped[-1] < UPDATES
    assert (runs.place / "warned" / "checkpoints" / f"update-{stopped[-1]:06d}" / "manifest.json").exists()
    runs.cluster.wait_for_state(job, ["COMPLETED"], 200)
    assert f"start 1, on n1 n2: goes on from {runs.place}/warned/checkpoints/update-{stopped[-1]:06d}" in runs.output(
        "warned"
    )
    assert_same_run(runs.place / "warned", whole)


def test_a_preempted_job_saves_and_goes_on(runs, whole) -> None:
    """Slurm tells the tasks alone, by SIGTERM, and waits for the grace time of the partition."""
    job = runs.job("preempted", *LONG, "slurm.partition=low")
    wait_for(lambda: len(runs.updates("preempted")) >= 2, SOON, "two updates")
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    other = runs.cluster.ask(*urgent)
    assert runs.cluster.wait_for_state(other, ["COMPLETED", "FAILED"], 90) == "COMPLETED"
    said = runs.output("preempted")
    assert "asked to stop by SIGTERM to rank" in said and "the job is queued again" in said
    runs.cluster.wait_for_state(job, ["COMPLETED"], 200)
    assert "start 1, on n1 n2: goes on from" in runs.output("preempted")
    assert_same_run(runs.place / "preempted", whole)


def test_a_job_that_lost_a_node_goes_on_from_its_last_checkpoint(runs, whole) -> None:
    job = runs.job("lost", *LONG)
    checkpoints = runs.place / "lost" / "checkpoints"
    wait_for(lambda: (checkpoints / "update-000010" / "manifest.json").exists(), SOON, "a checkpoint")
    runs.cluster.lose_node("n2")
    wait_for(lambda: "the job is queued again" in runs.output("lost"), 90, "a requeue")
    assert "lost n2; the job is queued again" in runs.output("lost")
    runs.cluster.start_node("n2")
    runs.cluster.wait_for_state(job, ["COMPLETED"], 200)
    said = runs.output("lost")
    assert f"start 1, on n1 n2: goes on from {checkpoints}/update-0000" in said
    assert_same_run(runs.place / "lost", whole)


def test_a_cancelled_job_ends_and_stays_ended_until_it_is_submitted_again(runs, whole) -> None:
    job = runs.job("cancelled", *LONG)
    again = runs.submit("cancelled", *LONG, "run.resume=true")
    assert again.returncode == 2 and f"job {job} of this run is" in again.stderr
    checkpoints = runs.place / "cancelled" / "checkpoints"
    wait_for(lambda: (checkpoints / "update-000010" / "manifest.json").exists(), SOON, "a checkpoint")
    runs.cluster.ask("scancel", job)
    assert runs.cluster.wait_for_state(job, ["CANCELLED"], 30) == "CANCELLED"
    wait_for(lambda: not runs.cluster.ask("squeue", "-h"), 60, "an empty queue")
    assert not [process for process in runs.cluster.tasks() if "r1mega" in process], "processes of the run live on"
    assert "queued again" not in runs.output("cancelled").replace("is not queued again", "")
    runs.cluster.wait_for_state(runs.job("cancelled", *LONG, "run.resume=true"), ["COMPLETED"], 200)
    assert_same_run(runs.place / "cancelled", whole)
