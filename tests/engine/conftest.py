"""Starts real SGLang servers, from an environment of their own (`make sglang-cpu`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from r1mega.launch.ports import free_port
from r1mega.launch.rank_processes import die_with_parent
from r1mega.rollout.engine_config import write_engine_config
from r1mega.rollout.server import server_command, server_env

sys.path.insert(0, str(Path(__file__).parent))
from where import DEVICE, need_gpus

REPO = Path(__file__).resolve().parents[2]
# Seconds. Three or more processes import 10 s of Python each: 20-30 s on two idle cores, minutes on busy ones.
START_LIMIT = 400.0
REQUEST_LIMIT = 120.0


class Server:
    """A server that answers. `post` and `get` raise AssertionError with its answer where that is an error."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def post(self, path: str, **body: Any) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def get(self, path: str) -> Any:
        return self._ask(path, None)

    def _ask(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with _DIRECT.open(request, timeout=REQUEST_LIMIT) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}\n{self.tail()}") from None
        return json.loads(text) if text else None

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}\n{self.tail()}"
            try:
                self.get("/health")
                return
            except (AssertionError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"the server was not ready within {START_LIMIT:.0f} s\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-60:])


# A proxy of the machine's has no way to a server on it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other by spinning, and take their cores from the server beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter of SGLang's environment. Where there is none the test is skipped, unless one was named, as `make
    test` does."""
    named = os.environ.get("R1MEGA_SGLANG_PYTHON")
    python = Path(named or REPO / ".venv-sglang" / "bin" / "python")
    if not python.exists():
        assert not named, f"R1MEGA_SGLANG_PYTHON: {named} is not there; run `make sglang-cpu`"
        pytest.skip(f"no environment of SGLang at {python}: run `make sglang-cpu`, or set R1MEGA_SGLANG_PYTHON")
    return python


@pytest.fixture(scope="session")
def model_dir(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_dir(family, **options)` -> a tiny checkpoint as an engine reads it."""

    def make(family: str, **options: Any) -> Path:
        source = checkpoint(family, **options)
        out = tmp_path_factory.mktemp(f"{family}-engine")
        write_engine_config(source, out)
        for weights in source.glob("*.safetensors*"):
            (out / weights.name).symlink_to(weights)
        return out

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def serve(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with serve(directory, **options) as server`: a server in fp32, gone with all its processes afterwards."""

    @contextmanager
    def run(directory: Path, **options: Any) -> Iterator[Server]:
        num_ranks = options.get("tp", 1) * options.get("dp", 1)
        need_gpus(num_ranks)
        log = tmp_path_factory.mktemp("server") / "log"
        port = free_port()
        command = server_command(
            python=sglang_python,
            model_dir=directory,
            host="127.0.0.1",
            port=port,
            device=DEVICE,
            dtype="float32",
            max_total_tokens=16384,
            max_running_requests=64,
            mem_fraction=0.3,
            **options,
        )
        env = os.environ | server_env(device=DEVICE, num_ranks=num_ranks)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),  # a killed pytest runs no `finally`
            )
        try:
            server = Server(process, port, log)
            server.wait_until_ready()
            yield server
        finally:
            _end(process)

    return run


def _end(process: subprocess.Popen) -> None:
    """Kill the group, whose leader's death alone would leave the ranks; none of them has anything to save."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
