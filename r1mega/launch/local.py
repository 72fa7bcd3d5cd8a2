"""A run on this machine: check, make the run directory, start one training process per rank."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import tempfile
from pathlib import Path

from r1mega.config import io
from r1mega.config.schema import Config, DeviceType
from r1mega.launch import preflight, replays, resume, rundir, supervise

WORKER = "r1mega.loop.worker"


def run(config: Config) -> int:
    """Run `config` to its end and return the exit code: 0, the failed rank's code, or 128 + the signal that ended it.

    Raises ConfigError before anything is written or started when the configuration has faults.
    """
    preflight.require(config)
    resume.prepare(config)
    config_path = rundir.create(config)
    return _run_workers(config, config_path, config_path.parent / rundir.LOG_DIR)


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


def _run_workers(config: Config, config_path: Path, log_dir: Path, *options: str) -> int:
    argv = [sys.executable, "-m", WORKER, "--config", str(config_path), *options]
    env = worker_env(config.device.type, config.device.threads)
    result = supervise.run_world(argv, config.parallel.world_size, log_dir=log_dir, env=env)
    if result.message:
        print(f"r1mega: {result.message}", file=sys.stderr)
    return result.exit_code


def worker_env(device: DeviceType, threads: int) -> dict[str, str]:
    """What every training process on one machine finds in its environment, besides its rank."""
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
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


def _free_port() -> int:
    """A free port below those that systems give to outgoing connections.

    Seconds pass before rank 0 listens on it: a port of that kind may by then be in use by a connection of another run.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports from 20000 to 32767 is free")
