"""What happens to real servers in a long run, and that no sequence is lost or doubled by it."""

from __future__ import annotations

import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
import torch.distributed as dist

from r1mega.models import hf_fields
from r1mega.models.hf_io import CheckpointWriter
from r1mega.rollout.client import EngineClient
from r1mega.rollout.server_pool import LIMITS
from r1mega.types import Completion, FinishReason, Request, SamplingParams
from r1mega.weights.disk import DiskPublisher
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.proof import PublishError, PublishProof, build_of

sys.path.insert(0, str(Path(__file__).parent))
from fleets import Servers, exporting, kill, servers

HANG_SECONDS = 15.0
PARAMS = SamplingParams(max_tokens=48)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def qwen2(checkpoint):
    return checkpoint("qwen2"), checkpoint("qwen2", seed=1)


@pytest.fixture(scope="module")
def fleet(qwen2, sglang_python, tmp_path_factory):
    options = {"sglang__hang_seconds": HANG_SECONDS, "sglang__restarts": 10}
    with servers(qwen2[0], tmp_path_factory.mktemp("fleet") / "run", sglang_python, **options) as made:
        yield made
        assert made.fault is None


@pytest.fixture
def client(fleet: Servers, qwen2, alone):
    """The trainer's side, version 1 published."""
    made = fleet.client()
    publisher(fleet, made, qwen2[0], alone).publish(exporting(qwen2[0]), 1)
    return made


def publisher(fleet: Servers, client, checkpoint: Path, group) -> DiskPublisher:
    fields = hf_fields.read(checkpoint)
    proof = PublishProof(fields, EngineLayout(), build_of("cpu", ()), torch.float32, 1.0)
    return DiskPublisher(fleet.place, client, fields, "fp32", proof, group)


def requests(count: int, num_samples: int = 4) -> list[Request]:
    return [Request(i, (256, *range(i % 200, i % 200 + 8)), num_samples) for i in range(count)]


def check_complete(found: list[Completion], asked: list[Request], version: int) -> None:
    assert [(c.key, c.index) for c in found] == [(r.key, index) for r in asked for index in range(r.num_samples)]
    assert {c.weight_version for c in found} == {version}
    assert all(len(c.token_ids) == len(c.logprobs) for c in found)
    assert {c.finish_reason for c in found} <= {FinishReason.stop, FinishReason.length}


def when(condition, act) -> threading.Thread:
    """`act` once the condition holds, in a thread."""

    def wait() -> None:
        deadline = time.monotonic() + 100
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_is_lost_in_mid_rollout(fleet: Servers, client, number: int) -> None:
    """Killed, or hung: its sequences are asked for again, and it comes back with the weights that are due."""
    asked, seen = requests(100), []
    engine = fleet.engines[0]
    starts = engine.starts
    thread = when(lambda: len(seen) >= 30, lambda: kill(engine, number))
    found = client.generate(asked, PARAMS, seen.append)
    thread.join()
    check_complete(found, asked, 1)
    assert Counter((c.key, c.index) for c in seen) == Counter((c.key, c.index) for c in found)
    deadline = time.monotonic() + 150
    while (engine.starts == starts or not engine.answered) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engine.starts == starts + 1
    assert httpx.get(f"{engine.url}/model_info").json()["weight_version"] == "1"
    check_complete(client.generate(requests(10), PARAMS), requests(10), 1)


def test_a_server_is_killed_in_mid_publish(fleet: Servers, client, qwen2, alone) -> None:
    engine = fleet.engines[1]
    starts, newest = engine.starts, fleet.place.path(2)
    thread = when(newest.exists, lambda: kill(engine))
    publisher(fleet, client, qwen2[1], alone).publish(exporting(qwen2[1]), 2)
    thread.join()
    deadline = time.monotonic() + 150
    while engine.starts == starts and time.monotonic() < deadline:
        time.sleep(0.1)
    check_complete(client.generate(requests(10), PARAMS), requests(10), 2)
    client.wait_until_ready()
    assert [httpx.get(f"{one.url}/model_info").json()["weight_version"] for one in fleet.engines] == ["2", "2"]


NAME = "model.layers.1.mlp.up_proj.weight"
PARAM = "model.layers.1.mlp.gate_up_proj.weight: the engine's is not what was published"


def flipped(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """One bit of one weight."""
    if name == NAME:
        tensor = tensor.clone()
        tensor.view(torch.int32)[3, 5] ^= 1
    return name, tensor


def renamed(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A name that SGLang does not know, which it skips in silence."""
    return ("model.layers.1.mlp.upper_proj.weight" if name == NAME else name), tensor


@pytest.mark.parametrize("damage", [flipped, renamed])
@pytest.mark.parametrize("times", [1, 2])
def test_weights_that_do_not_arrive(fleet, client, qwen2, alone, monkeypatch, capsys, damage, times) -> None:
    """Found and named, published once more; the second time is the last."""
    made, real = [], CheckpointWriter.add

    def add(writer: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        if writer not in made:
            made.append(writer)
        real(writer, *(damage(name, tensor) if len(made) <= times else (name, tensor)))

    monkeypatch.setattr(CheckpointWriter, "add", add)
    sending = publisher(fleet, client, qwen2[1], alone)
    if times == 1:
        sending.publish(exporting(qwen2[1]), 5)
    else:
        with pytest.raises(PublishError) as caught:
            sending.publish(exporting(qwen2[1]), 5)
        lines = str(caught.value).splitlines()
        assert lines[0] == "weights 5 did not arrive, published twice:"
        assert [line.partition(": ")[2].startswith(PARAM) for line in lines[1:]] == [True, True]
        assert all(NAME in line for line in lines[1:])
    assert f"engine 0 rank 0: {PARAM}" in capsys.readouterr().err
    assert len(made) == 2


def test_a_publish_that_is_skipped(fleet, client, qwen2, alone, monkeypatch) -> None:
    """The version moves on and the weights do not."""

    async def only_the_version(self: EngineClient, path: str, version: str, timeout: float) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": version}, timeout=timeout)

    monkeypatch.setattr(EngineClient, "load_from_disk", only_the_version)
    with pytest.raises(PublishError) as caught:
        publisher(fleet, client, qwen2[1], alone).publish(exporting(qwen2[1]), 6)
    assert "engine 0 rank 0: model.embed_tokens.weight: " in str(caught.value)
    assert str(caught.value).endswith("and 54 more parameters")  # all of them, on both servers


def wrong_shape(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, tensor[:-1] if name == NAME else tensor


@pytest.mark.parametrize(("damage", "words"), [(wrong_shape, f"{NAME} has shape"), (renamed, "upper_proj.weight is")])
def test_tensors_that_are_none_of_the_model_never_leave(fleet, client, qwen2, alone, damage, words) -> None:
    tensors = [damage(name, tensor) for name, tensor in exporting(qwen2[1]).export_hf(wanted=True)]
    with pytest.raises(ValueError, match=words):
        weights = SimpleNamespace(export_hf=lambda *, wanted: iter(tensors))
        publisher(fleet, client, qwen2[1], alone).publish(weights, 7)
    check_complete(client.generate(requests(5), PARAMS), requests(5), 1)  # what was published before is served on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sglang__extra_args": ["--no-such-flag"]}, "ended with exit code 2 before it first answered"),
        ({"sglang__startup_seconds": 4.0}, "has not answered 4 s after its start (sglang.startup_seconds)"),
    ],
)
def test_servers_that_never_get_well(qwen2, sglang_python, tmp_path, options, words) -> None:
    with servers(qwen2[0], tmp_path / "run", sglang_python, rollout__engines=1, **options) as made:
        deadline = time.monotonic() + 100
        while made.fault is None and time.monotonic() < deadline:
            time.sleep(0.1)
    assert made.fault is not None and words in made.fault
    assert f"log: {made.log_dir / 'engine0.log'}" in made.fault
    assert made.engines[0].process is not None and made.engines[0].process.poll() is not None


def test_a_port_that_is_taken(qwen2, sglang_python, tmp_path) -> None:
    with socket.socket() as taken, servers(qwen2[0], tmp_path / "run", sglang_python, rollout__engines=1) as made:
        taken.bind(("127.0.0.1", int(made.engines[0].url.rpartition(":")[2])))  # while the server is still importing
        taken.listen()
        deadline = time.monotonic() + 100
        while made.fault is None and time.monotonic() < deadline:
            time.sleep(0.1)
    assert made.fault is not None and "found its port taken" in made.fault, made.fault


class BrokenConnections(httpx.AsyncHTTPTransport):
    """One call in a hundred fails: half of them before they reach the server, half when the answer is on its way."""

    def __init__(self) -> None:
        super().__init__(limits=LIMITS)
        self.chance, self.broken = random.Random(0), 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        drawn = self.chance.random()
        self.broken += drawn < 0.01
        if drawn < 0.005:
            raise httpx.ConnectError("injected")
        answer = await super().handle_async_request(request)
        if drawn < 0.01:
            await answer.aread()
            raise httpx.ReadError("injected")
        return answer


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=[pytest.mark.extended, pytest.mark.timeout(900)])])
def test_many_short_requests_over_bad_connections(fleet: Servers, client, record_property, count) -> None:
    transport = BrokenConnections()
    bad = fleet.client(transport=transport, max_in_flight=128)
    bad.load_from_disk(str(fleet.place.newest().path), 1)
    resident = psutil.Process().memory_info().rss
    peak, done = [resident], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    asked = requests(count // 16, 16)
    began = time.monotonic()
    found = bad.generate(asked, SamplingParams(max_tokens=2))
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    check_complete(found, asked, 1)
    assert len(found) == count and transport.broken > count // 200
    record_property("grown by MB", (peak[0] - resident) / 1e6)
    record_property("requests a second", count / seconds)
    record_property("broken connections", transport.broken)
    assert peak[0] - resident < 100e6  # 20,000 completions are some 20 MB of it
