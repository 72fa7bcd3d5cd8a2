"""The cluster of these tests, and what their runs are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, why_not

# Late checks read every tensor and prompt again: the first test's job has them, and others need not wait for them.
QUICK = """
import sys
from r1mega import cli
from r1mega.launch import preflight
require = preflight.require
preflight.require = lambda config, late_checks=(), *, also=(): require(config, (), also=also)
sys.exit(cli.main())
"""


class Runs:
    """Submits shrunk toy runs to the cluster: two processes, one on each node."""

    def __init__(self, cluster: Cluster, checkpoint: Path, data: Path, place: Path) -> None:
        self.cluster, self.place = cluster, place
        self._common = [
            "experiment=toy", "cluster=slurm_test", "cluster.gpus_per_node=1", "parallel=single", "parallel.tp=2",
            f"model.hf={checkpoint}", f"data.train={data}", "data.eval=null", "data.template=plain",
            "algo.questions_per_round=2", "algo.group_size=4", "algo.updates_per_round=1", "algo.kl_coef=1.0",
            "optim.weight_decay=10", "optim.lr=1e-3", "rollout.max_tokens=16", "rollout.engines=1",
            "rollout.probe=false", "reward.workers=0", "logger.tensorboard=false", "checkpoint.keep_newest=2",
        ]  # fmt: skip

    def overrides(self, name: str, *more: str) -> list[str]:
        return [*self._common, f"run.dir={self.place / name}", *more]

    def submit(self, name: str, *more: str, quick: bool = True) -> subprocess.CompletedProcess[str]:
        """`r1mega submit` of the run of this name."""
        start = ["-c", QUICK] if quick else ["-m", "r1mega.cli"]
        command = [sys.executable, *start, "submit", *self.overrides(name, *more)]
        return subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, timeout=180)

    def job(self, name: str, *more: str, quick: bool = True) -> str:
        """The number of the job that the run became."""
        done = self.submit(name, *more, quick=quick)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    def updates(self, name: str) -> list[int]:
        """The updates in metrics.jsonl, as far as it is there."""
        path = self.place / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line)["update"] for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def output(self, name: str) -> str:
        """What the job's script and its controller have said."""
        return "".join(path.read_text() for path in sorted((self.place / name / "logs").glob("slurm-*.out")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def runs(cluster: Cluster, checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("slurm")
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 9)]
    data = place / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Runs(cluster, checkpoint("llama"), data, place)
