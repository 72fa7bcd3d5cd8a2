"""A real SGLang server as benchmarks/publish_cuda.py publishes to it, on the trainer's GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from r1mega.launch.ports import free_port
from r1mega.launch.rank_processes import die_with_parent
from r1mega.rollout.occupancy import ServerMemory
from r1mega.rollout.server import EVERYTHING, WEIGHTS, ServerOptions, server_command, server_env
from r1mega.rollout.sglang import SglangEngines
from r1mega.weights.proof import PublishError

PATIENCE = 120.0  # seconds until it answers
CACHED_TOKENS = 1_000_000


class RealServer(SglangEngines):
    """One server, which may be made deaf to what is published."""

    def __init__(self, process: subprocess.Popen, folder: tempfile.TemporaryDirectory, port: int) -> None:
        super().__init__([f"http://127.0.0.1:{port}"], max_in_flight=1, patience_seconds=PATIENCE)
        self._process, self._folder, self.is_deaf = process, folder, False

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over tensors, where it is not deaf."""
        if not self.is_deaf:
            super().update_from_tensors(payloads)

    def close(self) -> None:
        """End it and all its processes."""
        super().close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def started(python: Path, config: dict[str, Any]) -> RealServer:
    """A server of a model of that config.json in BF16, without weights; returns when it answers.

    Raises EnginesLost where it does not; its output is then on standard error.
    """
    folder = tempfile.TemporaryDirectory(prefix="r1mega-server-")
    (Path(folder.name) / "config.json").write_text(json.dumps(config))
    port = free_port()
    command = server_command(
        python=python,
        model_dir=folder.name,
        host="127.0.0.1",
        port=port,
        device="cuda",
        dtype="bfloat16",
        max_running_requests=16,
        mem_fraction=0.5,
        max_total_tokens=CACHED_TOKENS,
        load_format="dummy",
        options=ServerOptions(memory_saver=True),
        extra_args=["--skip-tokenizer-init"],
    )
    log = Path(folder.name) / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | server_env(device="cuda"),
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
    server = RealServer(process, folder, port)
    try:
        server.wait_until_ready()
    except Exception:
        print(log.read_text("utf-8", "replace")[-5000:], file=sys.stderr)
        server.close()
        raise
    return server


def compared(sharded: Any, server: RealServer, publish: Callable[[], None]) -> tuple[bool, bool]:
    """Whether a publish with all checksums was found right, as it was if it has returned; and whether one that does
    not reach the server, after one number has changed, is found wrong."""
    parameter = sharded.local[-1][2]
    with torch.no_grad():
        before = parameter.view(-1)[0].clone()
        parameter.view(-1)[0] += 1
        server.is_deaf = True
        try:
            publish()
            notices = False
        except PublishError:
            notices = True
        server.is_deaf = False
        parameter.view(-1)[0] = before
    publish()
    return True, notices


def given_back(server: RealServer) -> dict[str, float]:
    """GB in use on the device by all processes, while the server holds all, nothing, its weights and all again."""
    memory, found = ServerMemory(server, PATIENCE), {}
    for name, tags in (
        ("all held", EVERYTHING),
        ("nothing held", ()),
        ("weights held", (WEIGHTS,)),
        ("all held again", EVERYTHING),
    ):
        memory.hold(tags)
        free, total = torch.cuda.mem_get_info()
        found[name] = (total - free) / 1e9
    return found
