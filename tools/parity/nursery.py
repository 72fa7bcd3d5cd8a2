"""Worlds of CPU processes forked from one that has imported torch and Megatron: no rank waits for these imports.

For tests that start many worlds one after another. Apart from what is imported, a rank is the process that
`r1mega.launch.supervise` would start: with an environment, connections and random states of its own.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from r1mega.launch import local
from r1mega.launch.supervise import SETTLE_SECONDS, WorldResult, tail
from r1mega.parallel import fork


class Nursery:
    """The process that forks the worlds; it starts with the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run_world(
        self, argv: Sequence[str], world_size: int, *, log_dir: Path, env: Mapping[str, str] | None = None
    ) -> WorldResult:
        """As `supervise.run_world`, of a Python program: `argv` is the interpreter, a script and its arguments.

        The interpreter is the nursery's own, and rank 0 writes its output to its log as well.
        """
        log_dir.mkdir(parents=True, exist_ok=True)
        request = {"argv": list(argv), "world_size": world_size, "log_dir": str(log_dir), "env": dict(env or {})}
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(Path(__file__).resolve())],
                env={**os.environ, **local.worker_env("cpu", 1)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the nursery has ended"
        except BaseException:  # a time limit, for one: the answer to this request must not be taken for the next one's
            self.close()
            raise
        return WorldResult(**json.loads(answer))

    def close(self) -> None:
        """End the process and what it has started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Import what ranks need, then run a world for each line of the standard input and answer with how it ended."""
    from parity import stand_ins
    from r1mega.parallel import device

    stand_ins.install()
    device.prepare("cpu")
    for module in ("parity.ranks", "r1mega.algo.policy_loss", "r1mega.models.hf_io"):
        importlib.import_module(module)

    for line in sys.stdin:
        print(json.dumps(_fork_world(**json.loads(line))), flush=True)


def _fork_world(argv: list[str], world_size: int, log_dir: str, env: dict[str, str]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    logs = [Path(log_dir) / f"rank{rank}.log" for rank in range(world_size)]
    ranks = [context.Process(target=_be_rank, args=(argv, rank, world_size, log, env)) for rank, log in enumerate(logs)]
    for process in ranks:
        process.start()
    failed = _see_them_end(ranks)
    if not failed:
        return {"exit_code": 0}
    told = [f"rank {rank} of {world_size} (exit code {ranks[rank].exitcode}):\n{tail(logs[rank])}" for rank in failed]
    return {"exit_code": abs(ranks[failed[0]].exitcode or 1), "failed_rank": failed[0], "message": "\n".join(told)}


def _see_them_end(ranks: Sequence[multiprocessing.Process]) -> list[int]:
    """Wait until all have ended; the ranks that failed by themselves. What one failure leaves running is killed."""
    failed: list[int] = []
    # One look at all of them decides both whether one has failed and whom to wait for: one that ends between two looks
    # would be in neither.
    while None in (codes := [process.exitcode for process in ranks]):
        if not failed and any(codes):
            time.sleep(SETTLE_SECONDS)  # what the others say of it is told as well
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
            for process in ranks:
                process.kill()
        living = [process for process, code in zip(ranks, codes, strict=True) if code is None]
        ready = wait([*(process.sentinel for process in living), sys.stdin.fileno()])
        if sys.stdin.fileno() in ready:  # nothing is asked for while a world runs: whoever asks is gone
            for process in living:
                process.kill()
            sys.exit("the tests have ended before this world")
    return failed or [rank for rank, code in enumerate(codes) if code]


def _be_rank(argv: list[str], rank: int, world_size: int, log: Path, env: dict[str, str]) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(env | fork.numbers(rank, world_size))
    sys.argv = argv[1:]
    sys.path[0] = str(Path(argv[1]).parent)
    runpy.run_path(argv[1], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # of `parity`
    serve()
