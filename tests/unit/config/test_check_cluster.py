"""Processes and the machines that they are to fill."""

from __future__ import annotations

import pytest

from r1mega.config.check_cluster import check_cluster
from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler, Transport
from r1mega.config.schema import Config


@pytest.fixture
def config() -> Config:
    """Two machines of 8 GPUs under Slurm, filled by a trainer of TP8 x DP2 and two servers of 8 that take turns."""
    made = Config()
    made.stage.loop, made.device.type = Loop.rl, DeviceType.cuda
    made.cluster.scheduler, made.cluster.nodes, made.cluster.gpus_per_node = Scheduler.slurm, 2, 8
    made.parallel.tp, made.parallel.dp = 8, 2
    made.rollout.engine, made.rollout.engines, made.sglang.tp = EngineKind.sglang, 2, 8
    made.sglang.release = True
    return made


def messages(config: Config) -> list[str]:
    return [str(fault) for fault in check_cluster(config)]


def test_turns_on_the_same_gpus(config: Config) -> None:
    assert messages(config) == []
    config.rollout.engines = 3
    (found,) = messages(config)
    assert found.startswith(
        "rollout.engines: got rollout.engines=3 x sglang.tp=8 = 24; must be at most the cluster.nodes"
    )
    config.sglang.release, config.rollout.engines, config.sglang.transport = False, 2, Transport.ipc
    assert messages(config) == []


def test_gpus_of_their_own(config: Config) -> None:
    config.sglang.release = False
    (found,) = messages(config)
    assert "tp 8 x cp 1 x pp 1 x dp 2 = 16 and servers of rollout.engines=2 x sglang.tp=8 = 16" in found
    assert "trainer and servers have GPUs of their own" in found
    config.rollout.engines = 1
    (found,) = messages(config)
    assert found.startswith("parallel.dp: ") and found.endswith("; set parallel.dp=1")
    config.parallel.dp = 1
    assert messages(config) == []


def test_a_trainer_alone(config: Config) -> None:
    config.stage.loop = Loop.sft
    assert messages(config) == []
    config.parallel.dp = 4
    (found,) = messages(config)
    assert found == (
        "parallel.dp: got tp 8 x cp 1 x pp 1 x dp 4 = 32; must be cluster.nodes=2 x cluster.gpus_per_node=8 = 16, one "
        "process on each; set parallel.dp=2"
    )
    config.parallel.tp, config.parallel.dp = 3, 1
    (found,) = messages(config)
    assert found.endswith("; choose another layout or cluster")


def test_servers_alone(config: Config) -> None:
    config.stage.loop = Loop.evaluate
    assert messages(config) == []
    config.rollout.engines = 1
    (found,) = messages(config)
    assert found.startswith("rollout.engines: got rollout.engines=1 x sglang.tp=8 = 8; must be ")


def test_a_server_larger_than_a_machine(config: Config) -> None:
    config.rollout.engines, config.sglang.tp = 1, 16
    (found,) = messages(config)
    assert found.startswith("sglang.nodes_per_engine: got 1; a machine has cluster.gpus_per_node=8, and would hold 16")
    config.sglang.nodes_per_engine = 2
    assert messages(config) == []


def test_machines_without_gpus_are_filled_by_training_processes(config: Config) -> None:
    config.device.type, config.rollout.engines, config.sglang.release = DeviceType.cpu, 5, False
    assert messages(config) == []
    config.parallel.dp = 1
    assert messages(config) == []
    config.parallel.dp = 3
    (found,) = messages(config)
    assert found.startswith("parallel.dp: got tp 8 x cp 1 x pp 1 x dp 3 = 24; must be at most cluster.nodes=2")


def test_this_machine_is_not_compared(config: Config) -> None:
    config.cluster.scheduler, config.parallel.dp = Scheduler.local, 3
    assert messages(config) == []
    config.cluster.exact = True
    assert len(messages(config)) == 1
    config.device.type = DeviceType.cpu
    assert messages(config) == []


def test_sizes_below_one_are_for_the_bounds(config: Config) -> None:
    config.parallel.tp = 0
    assert messages(config) == []
