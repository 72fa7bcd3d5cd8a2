"""The real sglang-router, started and watched as a run does, before servers that answer without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from r1mega.config import choices, schema
from r1mega.launch import engines
from r1mega.launch.engine_process import EngineProcess, Limits, NodeProcess
from r1mega.launch.engines import EngineFleet
from r1mega.launch.ports import free_port
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import Completion, EngineRefused, FinishReason, Request, SamplingParams
from r1mega.weights.shelf import Shelf

REPO = Path(__file__).resolve().parents[3]
TCP_SERVER = Path(__file__).parent / "tcp_server.py"
PARAMS = SamplingParams(max_tokens=2)
REFUSED = 999  # the prompt that servers find fault with


@pytest.fixture(scope="module")
def router_python() -> str:
    """The Python of SGLang's environment; as with real servers, one that is named has to have the router."""
    named = os.environ.get("R1MEGA_SGLANG_PYTHON")
    python = named or str(REPO / ".venv-sglang" / "bin" / "python")
    has_router = Path(python).exists() and subprocess.run([python, "-c", "import sglang_router"]).returncode == 0
    assert has_router or not named, f"R1MEGA_SGLANG_PYTHON: {named} has no sglang-router; run `make sglang-cpu`"
    if not has_router:
        pytest.skip("no environment with sglang-router: run `make sglang-cpu`, or set R1MEGA_SGLANG_PYTHON")
    return python


class Looked:
    """A fleet that a thread of its own looks after."""

    def __init__(self, fleet: EngineFleet) -> None:
        self.fleet, self.fault = fleet, None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_after)
        self._thread.start()

    def _look_after(self) -> None:
        self.fleet.start()  # they end with the thread that starts them
        while not self._done.wait(0.05) and self.fault is None:
            self.fault = self.fleet.look()
        self.fleet.end()

    def end(self) -> None:
        self._done.set()
        self._thread.join()


@pytest.fixture
def looked(router_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Looked]:
    """Two servers and a router before them."""
    monkeypatch.setattr(engines, "_POLL_SECONDS", 0.1)
    place = Shelf(tmp_path / "engines")
    place.prepare()
    limits, ports, found = Limits(60, 60, 5), [], []
    for index in range(2):
        ports.append(free_port(taken=ports))
        argv = [sys.executable, str(TCP_SERVER), str(ports[-1]), str(REFUSED)]
        node = NodeProcess(lambda argv=argv: argv, {}, tmp_path / f"engine{index}.log")
        found.append(EngineProcess(f"engine {index}", f"http://127.0.0.1:{ports[-1]}", [node], limits))
    config = schema.Config()
    config.sglang.python, config.sglang.router_policy = router_python, choices.RouterPolicy.cache_aware
    router = engines._router(config, [engine.url for engine in found], tmp_path)
    made = Looked(EngineFleet(found, place, router=router))
    yield made
    made.end()
    assert made.fault is None
    assert router.process is not None and router.process.poll() is not None


def client_of(looked: Looked) -> SglangEngines:
    fleet = looked.fleet
    assert fleet.router is not None
    urls = [engine.url for engine in fleet.engines]
    made = SglangEngines(urls, max_in_flight=32, patience_seconds=60.0, router_url=fleet.router.url)
    made.load_from_disk("/weights/3", 3)
    return made


def requests(count: int, num_samples: int) -> list[Request]:
    return [Request(100 + i, (i, 7), num_samples) for i in range(count)]


def expected(count: int, num_samples: int) -> list[Completion]:
    return [
        Completion(100 + i, index, [i, i + 1], [-float(i)] * 2, FinishReason.stop, 3)
        for i in range(count)
        for index in range(num_samples)
    ]


def served(looked: Looked) -> list[int]:
    """Sequences that each server has answered since its start."""
    return [httpx.get(f"{engine.url}/served").json() for engine in looked.fleet.engines]


def kill(engine: EngineProcess | None) -> None:
    assert engine is not None and engine.process is not None
    os.killpg(engine.process.pid, signal.SIGKILL)


@pytest.mark.timeout(120)
def test_nothing_is_lost_or_doubled_whatever_dies(looked: Looked) -> None:
    """A server comes back with other weights, which the router cannot know; the router itself comes back."""
    client = client_of(looked)
    victim, other = looked.fleet.engines
    router, seen = looked.fleet.router, []
    assert router is not None

    def note(completion: Completion) -> None:
        seen.append(completion)
        if len(seen) == 300:
            kill(victim)
        if len(seen) == 1200:
            kill(router)

    found = client.generate(requests(125, 16), PARAMS, note)
    assert found == expected(125, 16)
    assert max(Counter((c.key, c.index) for c in seen).values()) == 1 and len(seen) == 2000
    assert (victim.starts, other.starts, router.starts) == (2, 1, 2)
    # Servers and router are as before: both are asked, with the right weights.
    until_both_are_asked(client, looked)
    versions = [httpx.get(f"{engine.url}/model_info").json()["weight_version"] for engine in looked.fleet.engines]
    assert versions == ["3", "3"]


def until_both_are_asked(client: SglangEngines, looked: Looked) -> None:
    before, deadline = served(looked), time.monotonic() + 30
    while not all(now > then for now, then in zip(served(looked), before, strict=True)):
        assert time.monotonic() < deadline, f"{before} sequences, then {served(looked)}"
        assert client.generate(requests(40, 2), PARAMS) == expected(40, 2)


@pytest.mark.timeout(60)
def test_what_servers_are_told_and_say_passes_through(looked: Looked) -> None:
    client = client_of(looked)
    until_both_are_asked(client, looked)
    with pytest.raises(EngineRefused, match="400 .*prompt 999"):
        client.generate([Request(1, (REFUSED,), 1)], PARAMS)
    # The router knows nothing of log-probs of given sequences: the servers are asked.
    before = sum(served(looked))
    assert client.logprobs([[5, 6, 7], [9, 4]]) == [[-6.0, -7.0], [-4.0]]
    assert sum(served(looked)) == before + 2
    # A prompt stays with the server that holds it, while the other has no less to do.
    long = [Request(i, (i, *range(200)), 8) for i in range(20)]
    client.generate(long, PARAMS)
    asked = [httpx.get(f"{engine.url}/prompts").json() for engine in looked.fleet.engines]
    on_both = {prompt for prompt in asked[0] if prompt in asked[1]}
    assert len({prompt for prompt in (*asked[0], *asked[1]) if prompt.endswith(", 199]")} - on_both) >= 15
