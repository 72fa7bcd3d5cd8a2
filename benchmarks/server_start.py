"""What a stock SGLang server costs without a GPU until it answers, and while nobody asks: as it comes, and r1mega's.

    make sglang-cpu && python -m benchmarks.server_start [--tp 1 2] [--rounds 3]

r1mega's `tools/sglang_cpu` makes its processes forks of the first, and `rollout/server.py` has its schedulers sleep.
Both ways in turn: seconds and CPU seconds of all its processes until it answers, their memory then by proportional set
size (a page that n processes share counts 1/n in each), and how many cores they keep busy with nothing to do.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil

from benchmarks.in_turn import compare
from benchmarks.models import make_model
from r1mega.launch.ports import free_port
from r1mega.rollout.engine_config import write_engine_config
from r1mega.rollout.server import server_command, server_env

REPO = Path(__file__).resolve().parents[1]
AS_IT_COMES = """
import runpy, sys
from r1mega_sglang_cpu import plugin
plugin.forked_processes = lambda: None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SLEEPS = "--sleep-on-idle"
START_SECONDS, IDLE_SECONDS = 600.0, 10.0


@dataclass(frozen=True)
class Cost:
    """Of one server: wall and CPU seconds until it answers, GB of all its processes, and cores kept busy by waiting."""

    seconds: float
    cpu_seconds: float
    gigabytes: float
    idle_cores: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", type=Path, default=REPO / ".venv-sglang/bin/python", help="of SGLang's environment")
    args = parser.parse_args()
    if not args.python.exists():
        sys.exit(f"--python: {args.python} is not there; run `make sglang-cpu`")
    print(f"tp  {'':11}  {'seconds':>7}  {'CPU s':>6}  {'GB':>5}  {'idle cores':>10}   medians of {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as place:
        source, model = Path(place) / "source", Path(place) / "model"
        make_model("deepseek_v3", source)
        model.mkdir()
        write_engine_config(source, model)
        (model / "model.safetensors").symlink_to(source / "model.safetensors")
        for tp in args.tp:
            ways = {
                "as it comes": partial(measure, args.python, model, tp, True, Path(place) / "log"),
                "r1mega's": partial(measure, args.python, model, tp, False, Path(place) / "log"),
            }
            for way, (seconds, cpu, gigabytes, idle) in compare(ways, args.rounds).items():
                print(f"{tp:2}  {way:11}  {seconds:7.1f}  {cpu:6.1f}  {gigabytes:5.2f}  {idle:10.2f}", flush=True)


def measure(python: Path, model: Path, tp: int, as_it_comes: bool, log: Path) -> Cost:
    """Start a server, wait until it answers, watch it do nothing, and end it."""
    port = free_port()
    command = server_command(
        python=python, model_dir=model, host="127.0.0.1", port=port, device="cpu", dtype="float32",
        max_total_tokens=16384, max_running_requests=64, mem_fraction=0.3, tp=tp,
    )  # fmt: skip
    if as_it_comes:
        _, dash_m, *rest = [word for word in command if word != SLEEPS]
        assert dash_m == "-m"
        command = [str(python), "-c", AS_IT_COMES, *rest]
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | server_env(device="cpu", num_ranks=tp),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait(process, port, begin + START_SECONDS, log)
        seconds, cpu = time.monotonic() - begin, _cpu_seconds(process.pid)
        gigabytes = sum(one.memory_full_info().pss for one in _family(process.pid)) / 1e9
        before, start = _cpu_seconds(process.pid), time.monotonic()
        time.sleep(IDLE_SECONDS)
        idle = (_cpu_seconds(process.pid) - before) / (time.monotonic() - start)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Cost(seconds, cpu, gigabytes, idle)


def _wait(process: subprocess.Popen, port: int, deadline: float, log: Path) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                return
        time.sleep(0.2)
    sys.exit(f"the server did not answer; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def _family(pid: int) -> list[psutil.Process]:
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def _cpu_seconds(pid: int) -> float:
    return sum(times.user + times.system for times in (one.cpu_times() for one in _family(pid)))


if __name__ == "__main__":
    main()
