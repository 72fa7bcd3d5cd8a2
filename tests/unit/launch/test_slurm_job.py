"""The controller of a job: the step it starts, and what it makes of a start's end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler
from r1mega.config.faults import ConfigError
from r1mega.config.schema import (
    ClusterConfig,
    Config,
    DeviceConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SlurmConfig,
    StageConfig,
)
from r1mega.launch import slurm, slurm_job
from r1mega.launch.slurm import Job
from r1mega.launch.supervise import WorldResult
from r1mega.loop import stop
from r1mega.loop.stop import STOPPED

NODES = ("n1", "n2", "n3")


def config_at(path: Path, **settings: object) -> Config:
    return Config(
        run=RunConfig(dir=str(path)),
        stage=StageConfig(loop=Loop.rl),
        device=DeviceConfig(type=DeviceType.cuda),
        rollout=RolloutConfig(engine=EngineKind.embedded),
        parallel=ParallelConfig(tp=8, dp=2),
        cluster=ClusterConfig(scheduler=Scheduler.slurm, nodes=3, gpus_per_node=8),
        slurm=SlurmConfig(engine_nodes=1, **settings),
    )


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`command(**settings)` -> srun's arguments and the environment of the training processes."""
    monkeypatch.setattr(slurm, "address_of", lambda node: f"address-of-{node}")

    def make(**settings: object) -> tuple[list[str], dict[str, str]]:
        config = config_at(tmp_path, **settings)
        places = [tmp_path / "config.yaml", tmp_path / "slurm" / "job-7.0", tmp_path / "logs"]
        world = slurm_job._world(config, Job("7", 0, NODES), *places)
        return list(world.command), dict(world.env)

    return make


def test_ranks_take_the_first_machines_and_meet_at_the_first(command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    words, env = command(rendezvous_minutes=2)
    assert {"--nodes=2", "--nodelist=n1,n2", "--ntasks=16", "--ntasks-per-node=8", "--distribution=block"} <= set(words)
    assert f"--output={tmp_path}/logs/rank%t.log" in words and "--kill-on-bad-exit=0" in words
    assert words[words.index("--") + 1 :][:3] == [sys.executable, "-m", "r1mega.loop.worker"]
    assert (env["MASTER_ADDR"], env["R1MEGA_RENDEZVOUS_SECONDS"]) == ("address-of-n1", "120")
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and "GLOO_SOCKET_IFNAME" not in env
    assert not [word for word in words if "container" in word]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")  # by the job's script, or the cluster
    assert command()[1]["GLOO_SOCKET_IFNAME"] == "ib0"


def test_ranks_in_a_container_run_its_python(command) -> None:
    words, _ = command(container_image="r1mega.sqsh", container_mounts=["/a:/a", "/b:/b"], cpus_per_task=12)
    assert {"--container-image=r1mega.sqsh", "--container-mounts=/a:/a,/b:/b", "--cpus-per-task=12"} <= set(words)
    assert words[words.index("--") + 1] == "python" and sys.executable not in words


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that were queued again; all machines answer, and the job runs."""
    found: list[str] = []
    monkeypatch.setattr(slurm, "requeue", found.append)
    monkeypatch.setattr(slurm, "lost_nodes", lambda nodes, seconds: [])
    return found


def conclude(config: Config, result: WorldResult, restarts: int = 0) -> int:
    return slurm_job._conclude(config, Job("7", restarts, NODES), result)


def test_a_run_at_its_end_is_not_queued_again(tmp_path: Path, asked: list[str], capsys) -> None:
    assert conclude(config_at(tmp_path), WorldResult(0)) == 0
    assert asked == [] and "has reached its end" in capsys.readouterr().err


def test_a_run_that_saved_is_queued_again(tmp_path: Path, asked: list[str], capsys) -> None:
    stop.ask(tmp_path, "SIGUSR1 to the job")
    assert conclude(config_at(tmp_path), WorldResult(STOPPED)) == STOPPED
    assert asked == ["7"]
    assert (
        "asked to stop by SIGUSR1 to the job; a checkpoint is written; the job is queued again"
        in capsys.readouterr().err
    )


def test_a_rank_that_failed_is_a_failure_where_all_machines_answer(tmp_path: Path, asked, monkeypatch, capsys) -> None:
    assert conclude(config_at(tmp_path), WorldResult(3, 1, "rank 1 of 16 failed first")) == 3
    assert asked == [] and "rank 1 of 16 failed first" in capsys.readouterr().err
    monkeypatch.setattr(slurm, "lost_nodes", lambda nodes, seconds: [nodes[1]])
    assert conclude(config_at(tmp_path), WorldResult(3, 1, "rank 1 of 16 failed first")) == 3
    assert asked == ["7"] and "lost n2; the job is queued again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "restarts", "why"),
    [({"requeue": False}, 0, "slurm.requeue=false"), ({"max_requeues": 2}, 2, "slurm.max_requeues=2")],
)
def test_where_it_is_not_queued_again_it_says_how_to_go_on(tmp_path, asked, capsys, settings, restarts, why) -> None:
    assert conclude(config_at(tmp_path, **settings), WorldResult(STOPPED), restarts) == STOPPED
    assert asked == []
    said = capsys.readouterr().err
    assert f"the job is not queued again: {why}" in said and "r1mega submit with run.resume=true" in said


@pytest.mark.parametrize(("state", "why"), [("COMPLETING", "it is COMPLETING"), ("", "it is not known any more")])
def test_a_job_that_somebody_has_ended_is_not_brought_back(tmp_path: Path, monkeypatch, state: str, why: str) -> None:
    for name, text in {"squeue": f"echo {state}", "scontrol": f"touch {tmp_path}/requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.requeue("7") == why
    assert not (tmp_path / "requeued").exists()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    assert slurm.requeue("7") is None
    assert (tmp_path / "requeued").exists()


def test_machines_that_start_nothing_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\ncase "$*" in *n2*) exit 1 ;; *n3*) exec sleep 30 ;; esac\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.lost_nodes(NODES, 1.0) == ["n2", "n3"]


def test_a_job_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cluster.nodes: got 3; the job has 2 machines; submit the run again"):
        slurm_job._prepare(config_at(tmp_path), Job("7", 0, NODES[:2]))


def test_the_template_is_a_script() -> None:
    for name in ("env.sh", "health_check.sh"):
        subprocess.run(["bash", "-n", str(slurm.templates() / name)], check=True, timeout=20)
