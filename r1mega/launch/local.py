"""A run on this machine: check, make the run directory, start one training process per rank."""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from r1mega.config import io
from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler
from r1mega.config.faults import Fault
from r1mega.config.schema import Config
from r1mega.launch import preflight, replays, resume, rundir, supervise
from r1mega.launch.engines import EngineFleet, fleet_of
from r1mega.launch.ports import free_port
from r1mega.launch.rank_processes import CAN_FORK
from r1mega.loop import stop

WORKER = "r1mega.loop.worker"


def run(config: Config) -> int:
    """Run `config` to its end and return the exit code: 0, the failed rank's code, or 128 + the signal that ended it.

    SIGUSR1 asks it to stop: the ranks take a checkpoint at their next boundary, and the exit code is loop.stop.STOPPED.
    Raises ConfigError before anything is written or started when the configuration has faults.
    """
    if config.cluster.scheduler is not Scheduler.local:
        preflight.require(config, also=[_starts_elsewhere(config)])
    if config.stage.loop is Loop.evaluate:
        return evaluate(config)
    if config.stage.loop is Loop.reject:
        return reject(config)
    preflight.require(config)
    resume.prepare(config)
    config_path = rundir.create(config)
    log_dir = config_path.parent / rundir.LOG_DIR
    stop.withdraw(config.run.dir)
    has_servers = config.stage.loop is Loop.rl and config.rollout.engine is EngineKind.sglang
    fleet = fleet_of(config, log_dir) if has_servers else None
    return _run_workers(config, config_path, log_dir, fleet=fleet)


def _starts_elsewhere(config: Config) -> Fault:
    """The fault of a run that is to be a job: its hundreds of processes must not start on a login node."""
    constraint = "r1mega train starts all processes on this machine"
    return Fault("cluster.scheduler", str(config.cluster.scheduler), constraint, "submit the run, or use cluster=local")


def evaluate(config: Config) -> int:
    """Evaluate a model on a benchmark, or go on with that; returns as `run`.

    Raises ConfigError before anything is written or started when the configuration has faults.
    """
    from r1mega.launch import evaluation

    return _run_engines(config, evaluation.prepare(config))


def reject(config: Config) -> int:
    """Collect samples and curate them, or go on with that; returns as `run`.

    Raises ConfigError before anything is written or started when the configuration has faults.
    """
    from r1mega.launch import rejection

    return _run_engines(config, rejection.prepare(config))


def _run_engines(config: Config, config_path: Path) -> int:
    """Run what only asks engines: embedded ones in its processes, or a fleet of servers beside one."""
    from r1mega.launch import evaluation

    log_dir = config_path.parent / rundir.LOG_DIR
    size = evaluation.wire_evaluate.world_size(config)
    return _run_workers(config, config_path, log_dir, fleet=evaluation.fleet(config, log_dir), world_size=size)


def replay(run_dir: Path, round_number: int, update: int) -> int:
    """Do one update of a past run again and print what it gave beside what was recorded.

    Returns 0 where both are identical, 1 where not. Raises ConfigError where the run's records do not go so far.
    """
    config, start = replays.plan(run_dir, round_number, update)
    with tempfile.TemporaryDirectory(prefix="r1mega-replay-") as work:
        config.run.resume_from = start
        config_path = Path(work) / "config.yaml"
        config_path.write_text(io.to_yaml(config), encoding="utf-8")
        out = Path(work) / "replay.json"
        asked = ["--replay", f"{round_number}:{update}", "--out", str(out)]
        code = _run_workers(config, config_path, Path(work) / rundir.LOG_DIR, *asked)
        return code or replays.show(json.loads(out.read_text()))


def _run_workers(
    config: Config,
    config_path: Path,
    log_dir: Path,
    *options: str,
    fleet: EngineFleet | None = None,
    world_size: int | None = None,
) -> int:
    argv = [sys.executable, "-m", WORKER, "--config", str(config_path), *options]
    env = worker_env(config.device.type, config.device.threads)
    # A replay has nothing to save, and an evaluation keeps every sample as it goes.
    ask = None if options or world_size else partial(stop.ask, config.run.dir)
    ranks = world_size or config.parallel.world_size
    divides = config.device.type is DeviceType.cpu and CAN_FORK
    result = supervise.run_world(argv, ranks, log_dir=log_dir, env=env, beside=fleet, ask_to_stop=ask, divides=divides)
    if result.message:
        print(f"r1mega: {result.message}", file=sys.stderr)
    return result.exit_code


def worker_env(device: DeviceType, threads: int) -> dict[str, str]:
    """What every training process on one machine finds in its environment, besides its rank."""
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    if device == DeviceType.cpu:
        # Without CUDA, compiling Megatron's fused helpers costs 15 s at the first step and gains nothing.
        env["TORCHDYNAMO_DISABLE"] = "1"
        # The host name may resolve to an address that no interface has; loopback always works on one machine.
        if Path("/sys/class/net/lo").exists():
            env["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        # Megatron relies on one hardware queue to start a communication before the matrix product it overlaps.
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return env
