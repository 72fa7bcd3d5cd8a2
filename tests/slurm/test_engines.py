"""What starts a server on a machine of the job, through a real srun; a small program stands for SGLang."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster import wait_for

from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler
from r1mega.config.schema import (
    ClusterConfig,
    Config,
    DeviceConfig,
    RolloutConfig,
    RunConfig,
    SglangConfig,
    StageConfig,
)
from r1mega.launch.engine_process import FAR_END_SECONDS, NodeProcess
from r1mega.launch.engines import _far_command
from r1mega.launch.slurm_job import place_engines
from r1mega.weights.shelf import Shelf

pytestmark = pytest.mark.timeout(120)

SERVER = "import os, sys, time; print(os.environ['SLURMD_NODENAME'], os.environ['MARK'], flush=True); time.sleep(300)"


def test_a_server_runs_on_its_machine_and_ends_with_the_controller(cluster, tmp_path: Path, monkeypatch) -> None:
    config = Config(
        run=RunConfig(dir=str(tmp_path)),
        stage=StageConfig(loop=Loop.rl),
        device=DeviceConfig(type=DeviceType.cpu),
        rollout=RolloutConfig(engine=EngineKind.sglang, engines=2),
        sglang=SglangConfig(python=sys.executable),
        cluster=ClusterConfig(scheduler=Scheduler.slurm, nodes=2, gpus_per_node=1),
    )
    monkeypatch.setenv("R1MEGA_DEAF", "")
    place_engines(config, ("n1", "n2"))
    assert config.sglang.hosts == ["n1", "n2"]
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    books = Shelf(Path(config.sglang.weights_dir))
    books.prepare()
    program = [sys.executable, "-c", SERVER]
    log = tmp_path / "engine1.log"
    node = NodeProcess(
        lambda: _far_command(config, books, "n2", "engine1", {"MARK": "a b"}, program), {}, log, is_far=True
    )
    node.start()
    try:
        wait_for(lambda: "n2 a b" in log.read_text(), 30, f"the server's first words in {log}")
        (server,) = [p for p in cluster.processes("n2") if p.cmdline() == program]
        # Slurm asks the tasks of a preempted job to end; the server is needed until the trainers have saved.
        psutil.Process(server.ppid()).terminate()
        time.sleep(1)
        node.beat(time.monotonic())
        assert server.is_running() and node.fault() is None and os.environ["R1MEGA_DEAF"] == "1"
    finally:
        node.end(time.monotonic() + FAR_END_SECONDS)
    wait_for(lambda: not server.is_running(), 20, "the server's end")
