"""What happens to real servers in a long run, and that no sequence is lost or doubled by it."""

from __future__ import annotations

import itertools
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from r1mega.models import hf_fields
from r1mega.models.safetensors_file import read_header
from r1mega.parallel.layout import Layout
from r1mega.rollout.buffer import Buffer
from r1mega.rollout.client import EngineClient
from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.rollout.occupancy import ServerMemory
from r1mega.rollout.producer import Demand, Producer
from r1mega.rollout.server import EVERYTHING, WEIGHTS
from r1mega.rollout.server_pool import LIMITS
from r1mega.types import Completion, FinishReason, Prompt, Request, Sample, SampleGroup, SamplingParams, Score
from r1mega.weights import spread
from r1mega.weights.disk import DiskPublisher
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.gathering import Gathering
from r1mega.weights.probe import PublishProbe
from r1mega.weights.process_group import GroupPublisher, plan_for
from r1mega.weights.proof import PublishError, PublishProof, build_of, publish_twice

sys.path.insert(0, str(Path(__file__).parent))
from fleets import Servers, disk_publisher, exporting, kill, served, servers
from where import DEVICE

HANG_SECONDS = 15.0
PARAMS = SamplingParams(max_tokens=48)


@pytest.fixture(scope="module")
def qwen2(checkpoint):
    return checkpoint("qwen2"), checkpoint("qwen2", seed=1)


@pytest.fixture(scope="module")
def fleet(qwen2, sglang_python, tmp_path_factory):
    options = {"sglang__hang_seconds": HANG_SECONDS, "sglang__restarts": 10, "sglang__router": True}
    with servers(qwen2[0], tmp_path_factory.mktemp("fleet") / "run", sglang_python, **options) as made:
        yield made
        assert made.fault is None


@pytest.fixture
def client(fleet: Servers, qwen2, alone):
    """The trainer's side, version 1 published."""
    made = fleet.client()
    publisher(fleet, made, qwen2[0], alone).publish(exporting(qwen2[0]), 1)
    return made


def publisher(fleet: Servers, client, checkpoint: Path, group, share: float = 1.0) -> DiskPublisher:
    fields = hf_fields.read(checkpoint)
    return disk_publisher(fleet, client, fields, EngineLayout(), group, share)


def requests(count: int, num_samples: int = 4, first: int = 0) -> list[Request]:
    starts = [(first + i) % 200 for i in range(count)]
    return [Request(i, (256, *range(start, start + 8)), num_samples) for i, start in enumerate(starts)]


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


@pytest.mark.parametrize(
    ("number", "through_router"),
    [
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.extended),
        (signal.SIGSTOP, False),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.extended),
        pytest.param(signal.SIGSTOP, True, marks=pytest.mark.extended),
    ],
)
def test_a_server_is_lost_in_mid_rollout(
    fleet: Servers, qwen2, alone, client, number: int, through_router: bool
) -> None:
    """Killed, or hung: its sequences are asked for again, and it comes back with the weights that are due."""
    if through_router:
        client = fleet.client(through_router=True)
        publisher(fleet, client, qwen2[0], alone).publish(exporting(qwen2[0]), 1)
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


def test_a_router_asks_both_servers(fleet: Servers, client, qwen2, alone) -> None:
    """What comes through it is what servers say that are asked directly, before and after new weights."""
    routed, greedy = fleet.client(through_router=True), SamplingParams(max_tokens=16, temperature=0.0)
    for version, checkpoint in ((3, qwen2[1]), (4, qwen2[0])):
        publisher(fleet, routed, checkpoint, alone).publish(exporting(checkpoint), version)
        client.load_from_disk(str(fleet.place.path(version)), version)
        before, deadline = [served(engine) for engine in fleet.engines], time.monotonic() + 60
        # The router takes its time to send to a server again that was away, and new prompts: those that another
        # server has in its cache still go there.
        for first in itertools.count(0, 60):
            prompts = requests(60, 1, first)
            found = routed.generate(prompts, greedy)
            check_complete(found, prompts, version)
            asked = {i for i, engine in enumerate(fleet.engines) if served(engine) > before[i]}
            if len(asked) == 2 or time.monotonic() > deadline:
                break
        assert len(asked) == 2
        direct = client.generate(prompts, greedy)
        assert [c.token_ids for c in found] == [c.token_ids for c in direct]
        pairs = zip(found, direct, strict=True)
        gaps = [abs(a - b) for x, y in pairs for a, b in zip(x.logprobs, y.logprobs, strict=True)]
        assert max(gaps) < 1e-4  # sums in other orders, as batches are others


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


@pytest.mark.extended
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_is_lost_while_weights_come_over_gloo(fleet: Servers, client, qwen2, alone, monkeypatch, number):
    """Between two buckets: the other server is not kept waiting, and both have the weights at the second attempt."""
    fields, engine = hf_fields.read(qwen2[0]), fleet.engines[1]
    proof = PublishProof(fields, EngineLayout(), build_of(DEVICE, ()), torch.float32, 1.0)
    plan = plan_for(fields, Layout(), proof, serves="fp32", held="fp32", backend="gloo", turn_bytes=60_000)
    gathering = Gathering(plan, 0, torch.device("cpu"))
    sending = GroupPublisher(gathering, client, proof, alone, num_ranks=[1, 1], backend="gloo", seconds=200)
    sending.publish(exporting(qwen2[0]), 1)
    starts, calls, update = engine.starts, [], client.update_from_group

    def update_once_killed(name, tensors) -> None:
        calls.append(name)
        if len(calls) == 3:
            kill(engine, number)
        update(name, tensors)

    monkeypatch.setattr(client, "update_from_group", update_once_killed)
    sending.publish(exporting(qwen2[1]), 2)
    assert engine.starts == starts + 1 and client.weight_versions() == ["2", "2"]
    assert len(set(calls)) == 2  # the groups were made anew
    check_complete(client.generate(requests(10), PARAMS), requests(10), 2)


class Questions:
    """Prompts without end."""

    def __init__(self) -> None:
        self.taken = 0

    def next(self, count: int) -> list[Prompt]:
        self.taken += count
        return [
            Prompt(str(n), "q", "a", (256, *range(n % 200, n % 200 + 8))) for n in range(self.taken - count, self.taken)
        ]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


def nothing(_prompt: Prompt, _text: str) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(Score(0.0))
    return future


def largest_difference(models: dict[int, EmbeddedEngine], groups: list[SampleGroup]) -> float:
    """Between the log-probs that came with the samples and those of a forward under the weights each token names."""
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    sequences = [[*prompt.token_ids, *sample.token_ids] for prompt, sample in pairs]
    found = {version: engine.logprobs(sequences) for version, engine in models.items()}
    return max(
        abs(sample.rollout_logprobs[i] - found[span.weight_version][n][len(prompt.token_ids) - 1 + i])
        for n, (prompt, sample) in enumerate(pairs)
        for span in sample.spans
        for i in range(span.start, span.end)
    )


END = 257  # the tokenizer's end of a sequence


def versions_of(sample: Sample) -> list[int]:
    return [span.weight_version for span in sample.spans]


@pytest.mark.parametrize("demand", [Demand(12, carries=True), Demand(12, ahead=1)], ids=["stopped", "running on"])
def test_sequences_go_on_under_the_weights_published_next(fleet, qwen2, alone, record_property, demand: Demand) -> None:
    """Stopped with their round, or retracted while weights are loaded."""
    # Six sequences at once on each server: some run whenever they are interrupted.
    made = fleet.client(overlaps=demand.ahead > 0, max_in_flight=6)
    producer = Producer(made, Buffer(4, 1), Questions(), demand, lambda tokens: "", nothing)
    # Of 259 tokens: a sequence goes on for 30 tokens on average, some for the whole length.
    ends = tuple(range(8))
    params, rounds = SamplingParams(max_tokens=160, stop_token_ids=ends), []
    for version in (1, 2):
        publisher(fleet, made, qwen2[version - 1], alone).publish(exporting(qwen2[version - 1]), version)
        made.go_on()
        taken, counts = producer.round(4 if version == 1 else 12, params, version, is_last=version == 2)
        rounds.append([group.scored() for group in taken])
        assert counts["rollout/used"] == 4 * len(taken) and counts["rollout/dropped"] == 0
    groups = [group for found in rounds for group in found]
    samples = [sample for group in groups for sample in group.samples]
    assert len({group.prompt.id for group in groups}) == 16 and len(samples) == 64
    for sample in samples:
        assert not set(sample.token_ids[:-1]) & {*ends, END}, "it went on after its end"
        is_ended = sample.token_ids[-1] in (*ends, END)
        assert sample.finish_reason is (FinishReason.stop if is_ended else FinishReason.length)
        assert is_ended or len(sample.token_ids) == 160
    across = [sample for sample in samples if versions_of(sample) == [1, 2]]
    record_property("sequences of two versions", len(across))
    assert across and all(versions_of(sample) == [1] for group in rounds[0] for sample in group.samples)
    models = {version: EmbeddedEngine(qwen2[version - 1]) for version in (1, 2)}
    for version, model in models.items():
        model.load(exporting(qwen2[version - 1]).export_hf(wanted=True), version)
    difference = largest_difference(models, groups)
    record_property("largest difference of log-probs", difference)
    assert difference < 1e-4  # fp32 summed in other orders
    assert largest_difference({1: models[2], 2: models[1]}, groups) > 0.1
    producer.close()


NAME = "model.layers.1.mlp.up_proj.weight"
PARAM = "model.layers.1.mlp.gate_up_proj.weight: the engine's is not what was published"


def flipped(file: Path) -> None:
    """One bit of one weight."""
    (place,) = (stored for stored in read_header(file) if stored.name == NAME)
    content = bytearray(file.read_bytes())
    content[place.at + 1000] ^= 1
    file.write_bytes(content)


def renamed(file: Path) -> None:
    """A name that SGLang does not know, which it skips in silence."""
    file.write_bytes(file.read_bytes().replace(NAME.encode(), NAME.replace("up_proj", "oh_proj").encode()))


@pytest.mark.parametrize("damage", [flipped, renamed])
@pytest.mark.parametrize("times", [1, 2])
def test_weights_that_do_not_arrive(fleet, client, qwen2, alone, monkeypatch, capsys, damage, times) -> None:
    """Found and named, published once more; the second time is the last."""
    made, real = [], spread.complete

    def complete(path: Path, *rest: object) -> Path | None:
        replaced = real(path, *rest)
        made.append(path)
        if len(made) <= times:
            damage(path / "model.safetensors")
        return replaced

    monkeypatch.setattr(spread, "complete", complete)
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

    async def only_the_version(self: EngineClient, path: str, version: str, timeout: float, **_: bool) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": version}, timeout=timeout)

    monkeypatch.setattr(EngineClient, "load_from_disk", only_the_version)
    with pytest.raises(PublishError) as caught:
        publisher(fleet, client, qwen2[1], alone).publish(exporting(qwen2[1]), 6)
    assert "engine 0 rank 0: model.embed_tokens.weight: " in str(caught.value)
    assert str(caught.value).endswith("and 54 more parameters")  # all of them, on both servers


SEQUENCES = [(256, *range(start, start + 60)) for start in (0, 50, 100, 150)]


def trainers_logprobs(checkpoint: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logprobs = [model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1) for tokens in SEQUENCES]
    return [
        one.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0] for one, tokens in zip(logprobs, SEQUENCES, strict=True)
    ]


def perturbed(file: Path) -> None:
    """One number of one matrix is another."""
    (place,) = (stored for stored in read_header(file) if stored.name == NAME)
    content = bytearray(file.read_bytes())
    (before,) = struct.unpack_from("<f", content, place.at)
    struct.pack_into("<f", content, place.at, before + 0.5)
    file.write_bytes(content)


@pytest.mark.parametrize("fault", ["one weight", "one server"])
def test_the_probe_finds_what_no_checksum_is_asked_for(
    fleet, client, qwen2, alone, monkeypatch, capsys, record_property, fault
) -> None:
    """Without checksums: one weight that is another, the first time; one server that is skipped both times."""
    published, real, load = [], spread.complete, EngineClient.load_from_disk

    def complete(path: Path, *rest: object) -> Path | None:
        replaced = real(path, *rest)
        if fault == "one weight" and len(published) == 1:
            perturbed(path / "model.safetensors")
        return replaced

    async def skip(self: EngineClient, path: str, version: str, timeout: float, **how: bool) -> None:
        if fault == "one server" and self.url == fleet.engines[1].url:
            await self._call("POST", "/update_weight_version", {"new_version": version}, timeout=timeout)
        else:
            await load(self, path, version, timeout, **how)

    monkeypatch.setattr(spread, "complete", complete)
    monkeypatch.setattr(EngineClient, "load_from_disk", skip)
    probe = PublishProbe(
        SEQUENCES,
        lambda asked: dict(zip(("first", "second"), client.logprobs_of_each(asked), strict=True)),
        "fp32",
        alone,
    )
    sending = publisher(fleet, client, qwen2[1], alone, share=0.0)

    def once() -> list[str]:
        published.append(8)
        sending.publish(exporting(qwen2[1]), 8)
        return probe.faults(trainers_logprobs(qwen2[1]))

    if fault == "one weight":
        publish_twice(once, 8, speaks=True)
        told = capsys.readouterr().err
        assert "weights 8 did not arrive, publishing again: first: its log-probs" in told and "; second: its" in told
        record_property("largest gap of the probe", probe.metrics["sync/probe_gap_max"])
        assert probe.metrics["sync/probe_gap_max"] < 1e-4
    else:
        with pytest.raises(PublishError, match="weights 8 did not arrive, published twice:\nsecond: its log-probs"):
            publish_twice(once, 8, speaks=True)
    assert published == [8, 8]


@pytest.mark.extended
def test_servers_take_turns_with_a_trainer(fleet: Servers, client, qwen2, alone) -> None:
    """Memory is given back and taken again; nothing is asked of a server that could make it use what it has not; one
    that is lost meanwhile is started again when its turn comes."""
    memory, lost = ServerMemory(client, 200.0), fleet.engines[0]
    client.generate(requests(5), PARAMS)
    memory.hold(())
    fleet.place.set_turn(trainers=True)
    starts, released = [engine.starts for engine in fleet.engines], time.monotonic()
    wait_until(lambda: all(engine.answered > released + 2 for engine in fleet.engines))  # watched all the same
    kill(lost)
    wait_until(lambda: lost.due)
    assert [engine.starts for engine in fleet.engines] == starts
    fleet.place.set_turn(trainers=False)
    memory.hold((WEIGHTS,))
    assert lost.starts == starts[0] + 1 and fleet.engines[1].starts == starts[1]
    publisher(fleet, client, qwen2[1], alone).publish(exporting(qwen2[1]), 9)
    memory.hold(EVERYTHING)
    check_complete(client.generate(requests(10), PARAMS), requests(10), 9)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "did not come to it in time"
        time.sleep(0.05)


SLOT = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.mark.parametrize(("damage", "words"), [(lambda shard: shard[:-1], "has shape"), (None, "is missing")])
def test_shards_that_are_none_of_the_model_never_leave(fleet, client, qwen2, alone, damage, words) -> None:
    whole = exporting(qwen2[1]).shards()
    shards = [entry for entry in whole if entry[0].name != SLOT]
    if damage is not None:
        shards += [(slot, index, damage(shard)) for slot, index, shard in whole if slot.name == SLOT]
    with pytest.raises(ValueError, match=f"{SLOT} {words}"):
        publisher(fleet, client, qwen2[1], alone).publish(SimpleNamespace(shards=lambda: shards), 7)
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


@pytest.mark.extended
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
