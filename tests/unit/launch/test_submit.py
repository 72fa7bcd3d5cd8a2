"""The script of a job, its checks, and what is left behind; sbatch is a small program of ours."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.config.check import _is_absent
from r1mega.config.check_slurm import check_slurm, check_submit, ranks_per_node
from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler
from r1mega.config.faults import ConfigError
from r1mega.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DeviceConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SglangConfig,
    SlurmConfig,
    StageConfig,
)
from r1mega.launch import preflight, resume, slurm_job, submit
from r1mega.launch.slurm import Job


def config_at(path: Path, **sections: object) -> Config:
    """Sixteen processes on two machines of eight GPUs."""
    given = {
        "run": RunConfig(name="one run", dir=str(path)),
        "stage": StageConfig(loop=Loop.rl),
        "device": DeviceConfig(type=DeviceType.cuda),
        "parallel": ParallelConfig(tp=8, dp=2),
        "rollout": RolloutConfig(engine=EngineKind.embedded),
        "cluster": ClusterConfig(scheduler=Scheduler.slurm, nodes=2, gpus_per_node=8),
        "checkpoint": CheckpointConfig(every=4),
    }
    return Config(**{**given, **sections})


def faults(config: Config) -> list[str]:
    return [str(fault) for fault in (*check_slurm(config), *check_submit(config))]


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_script_asks_for_what_the_sections_say(tmp_path: Path) -> None:
    settings = SlurmConfig(
        partition="gpu", account="lab", qos="long", time_limit="24:00:00", signal_seconds=900, cpus_per_task=12,
        gpu_request="--gres=gpu:{count}", setup=["module load cuda"], extra=["--constraint=h100"],
        network_interface="ib0", python="venv/bin/python",
    )  # fmt: skip
    config = config_at(tmp_path / "run", slurm=settings)
    assert faults(config) == []
    script = submit.render(config, tmp_path / "run" / "config.yaml")
    found = directives(script)
    assert found[:9] == [
        "--job-name=one-run", "--nodes=2", "--ntasks-per-node=8", "--partition=gpu", "--account=lab", "--qos=long",
        "--time=24:00:00", "--cpus-per-task=12", "--gres=gpu:8",
    ]  # fmt: skip
    assert found[9:13] == ["--exclusive", "--mem=0", "--signal=B:USR1@900", "--requeue"]
    assert f"--output={tmp_path}/run/logs/slurm-%j.out" in found and found[-1] == "--constraint=h100"
    assert "\nmodule load cuda\n" in script and "export NCCL_SOCKET_IFNAME=ib0" in script
    assert "health_check.sh --gpus 8 --gpu-memory 80" in script
    assert script.rstrip().endswith(
        f'exec "venv/bin/python" -m r1mega.launch.slurm_job --config "{tmp_path}/run/config.yaml"'
    )
    assert "@" not in script.replace("B:USR1@900", "")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)


def test_what_is_left_out_leaves_a_sound_script(tmp_path: Path) -> None:
    settings = SlurmConfig(exclusive=False, requeue=False, health_check=False)
    config = config_at(tmp_path, slurm=settings, device=DeviceConfig(type=DeviceType.cpu))
    script = submit.render(config, tmp_path / "config.yaml")
    assert "--no-requeue" in directives(script) and "--exclusive" not in directives(script)
    assert not [line for line in directives(script) if "gpu" in line]
    assert "health_check.sh" not in script and "scontrol" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"cluster": ClusterConfig()}, "cluster.scheduler: got local; r1mega submit makes a Slurm job"),
        ({"run": RunConfig(dir="a run")}, "run.dir: got a run; goes into a script"),
        ({"checkpoint": CheckpointConfig()}, "checkpoint.every: got 0; a job that is requeued"),
        ({"parallel": ParallelConfig(tp=8, dp=3)}, "must be at most 2 machines x cluster.gpus_per_node=8"),
        ({"parallel": ParallelConfig(tp=3)}, "must be the same number on each of 2 machines"),
        ({"parallel": ParallelConfig(tp=8)}, "leaves accelerators of 2 machines x cluster.gpus_per_node=8 idle"),
        ({"slurm": SlurmConfig(engine_nodes=2)}, "slurm.engine_nodes: got 2; must leave machines to the trainers"),
        ({"slurm": SlurmConfig(engine_nodes=1)}, "slurm.engine_nodes: got 1; only SGLang servers need"),
        ({"slurm": SlurmConfig(time_limit="a day")}, "slurm.time_limit: got a day; must be a time as sbatch"),
        ({"slurm": SlurmConfig(extra=["constraint=h100"])}, "slurm.extra: got constraint=h100; must be one option"),
        ({"slurm": SlurmConfig(extra=["--nodes=4"])}, "slurm.extra: got --nodes=4; the job's script decides this one"),
        ({"slurm": SlurmConfig(extra=["-N 4"])}, "slurm.extra: got -N 4; the job's script decides this one"),
        ({"slurm": SlurmConfig(partition="a b")}, "slurm.partition: got 'a b'; must be one word"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_is_refused_before_it_is_queued(tmp_path: Path, sections: dict, said: str) -> None:
    assert any(said in fault for fault in faults(config_at(tmp_path, **sections)))


@pytest.mark.parametrize("limit", ["90", "24:00:00", "2-12", "2-12:30:00", "UNLIMITED"])
def test_times_that_sbatch_takes(tmp_path: Path, limit: str) -> None:
    assert faults(config_at(tmp_path, slurm=SlurmConfig(time_limit=limit))) == []


@pytest.mark.parametrize(("image", "is_absent"), [(None, True), ("r1mega.sqsh", False)])
def test_packages_of_a_container_are_not_looked_for_outside(tmp_path: Path, image: str | None, is_absent: bool) -> None:
    assert _is_absent(config_at(tmp_path, slurm=SlurmConfig(container_image=image)), "no_such_package") is is_absent
    assert not _is_absent(config_at(tmp_path, slurm=SlurmConfig(container_image=image)), "json")


def with_servers(path: Path, **changes: object) -> Config:
    """Four machines of eight GPUs: two for the trainers, two for servers."""
    settings = {"engines": 4, "tp": 4, "nodes": 1, "engine_nodes": 2, "cluster_nodes": 4} | changes
    return config_at(
        path,
        rollout=RolloutConfig(engine=EngineKind.sglang, engines=settings["engines"]),
        sglang=SglangConfig(tp=settings["tp"], nodes_per_engine=settings["nodes"]),
        slurm=SlurmConfig(engine_nodes=settings["engine_nodes"]),
        cluster=ClusterConfig(scheduler=Scheduler.slurm, nodes=settings["cluster_nodes"], gpus_per_node=8),
    )


def test_servers_take_the_last_machines(tmp_path: Path) -> None:
    config = with_servers(tmp_path)
    assert faults(config) == [] and ranks_per_node(config) == 8
    slurm_job.place_engines(config, ("a", "b", "c", "d"))
    assert config.sglang.hosts == ["c", "c", "d", "d"]
    assert "{host}" in config.sglang.remote and config.sglang.weights_dir == str(tmp_path / "engines")


def test_a_server_of_two_machines_has_a_process_on_each(tmp_path: Path) -> None:
    config = with_servers(tmp_path, engines=2, tp=8, nodes=2)
    slurm_job.place_engines(config, ("a", "b", "c", "d"))
    assert config.sglang.hosts == ["c", "d", "c", "d"]


def test_servers_without_machines_of_their_own_share_the_trainers(tmp_path: Path) -> None:
    config = with_servers(tmp_path, engine_nodes=0, cluster_nodes=2)
    slurm_job.place_engines(config, ("a", "b"))
    assert config.sglang.hosts == ["a", "a", "b", "b"]


def test_servers_that_find_no_room_and_fields_that_the_job_fills_in(tmp_path: Path) -> None:
    config = with_servers(tmp_path, engines=5)
    assert any("have room for 4 server processes of 4 accelerators" in fault for fault in faults(config))
    config = with_servers(tmp_path)
    config.sglang = replace(config.sglang, hosts=["x"] * 4, remote="ssh {host}")
    assert {fault.split(":")[0] for fault in faults(config)} == {"sglang.hosts", "sglang.remote"}
    config = with_servers(tmp_path)
    config.slurm.container_image = "image.sqsh"
    assert any("SGLang servers are started without a container only" in fault for fault in faults(config))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sbatch that takes what is not for the partition `none`, and an squeue by which job 7 runs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = {
        "sbatch": 'grep -q "partition=none" "$2" && { echo "invalid partition" >&2; exit 1; }\necho "7;here"',
        "squeue": 'echo "${STATE-}"',
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(preflight, "require", lambda config, also: None)
    monkeypatch.setattr(resume, "find", lambda config: None)
    return programs


def test_a_submitted_run_has_its_directory_and_its_job(sbatch: Path, tmp_path: Path, capsys) -> None:
    config = config_at(tmp_path / "run")
    assert submit.run(config) == 0
    run_dir = tmp_path / "run"
    assert capsys.readouterr().out == f"job 7: {run_dir}; its output: {run_dir}/logs/slurm-7.out\n"
    assert (run_dir / "slurm" / "job").read_text() == "7\n"
    assert (run_dir / "slurm" / "job.sbatch").read_text() == submit.render(config, run_dir / "config.yaml")
    assert "nodes: 2" in (run_dir / "config.yaml").read_text()


def test_a_dry_run_prints_the_same_script_and_writes_nothing(sbatch: Path, tmp_path: Path, capsys) -> None:
    config = config_at(tmp_path / "run")
    assert submit.run(config, dry_run=True) == 0
    assert capsys.readouterr().out == submit.render(config, tmp_path / "run" / "config.yaml")
    assert not (tmp_path / "run").exists()


def test_what_sbatch_refuses_leaves_nothing_behind(sbatch: Path, tmp_path: Path, capsys) -> None:
    config = config_at(tmp_path / "run", slurm=SlurmConfig(partition="none"))
    assert submit.run(config) == 1
    assert capsys.readouterr().err == "r1mega: sbatch has not taken the job: invalid partition\n"
    assert not (tmp_path / "run").exists()


def test_a_run_whose_job_lives_is_not_queued_twice(sbatch: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    config = config_at(tmp_path / "run")
    assert submit.run(config) == 0
    config.run.resume = True
    monkeypatch.setenv("STATE", "RUNNING")
    with pytest.raises(ConfigError, match="job 7 of this run is RUNNING; wait for it, or end it: scancel 7"):
        submit.run(config)
    monkeypatch.setenv("STATE", "")
    assert submit.run(config) == 0
    assert (tmp_path / "run" / "config.resumed-1.yaml").exists()


def test_outside_a_job_nobody_is_a_controller() -> None:
    with pytest.raises(ValueError, match="SLURM_JOB_ID is not set: this runs inside a Slurm job; use r1mega submit"):
        Job.of({})
