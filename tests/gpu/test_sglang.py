"""Real SGLang servers on a GPU: what they say, publishes over CUDA's handles of memory, memory that is given back.

One server for most of it. tests/engine runs on a GPU as it does on a CPU; what needs two processes of servers is
skipped there on a machine with one GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from r1mega.config.choices import Transport
from r1mega.models import hf_fields
from r1mega.parallel.layout import Layout
from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.rollout.occupancy import ServerMemory
from r1mega.rollout.server import EVERYTHING, WEIGHTS
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import Completion, Request, SamplingParams
from r1mega.weights import ipc
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.exchange import Exchange
from r1mega.weights.ipc import IpcPublisher
from r1mega.weights.plan import PublishPlan
from r1mega.weights.probe import PublishProbe
from r1mega.weights.proof import PublishError, PublishProof, build_of, publish_twice

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
import test_runs
from fleets import Servers, disk_publisher, exporting, kill, servers

REPO = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
CACHED = 6_000_000  # tokens: 1 KiB each in this model, 6.1 GB
TOLERANCE = 1e-4  # fp32 summed in other orders: measured up to 3e-6 on CPU. A wrong weight shows as 0.1 and more
NAME = "model.layers.1.mlp.up_proj.weight"
PARAM = "model.layers.1.mlp.gate_up_proj.weight"
PROMPTS = [(256, *range(30, 42)), (256, *range(30, 60)), (256, 7), (256, *(17 * i % 250 for i in range(90)))]
SAMPLED = SamplingParams(max_tokens=40)
pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def sglang_python() -> Path:
    named = os.environ.get("R1MEGA_SGLANG_PYTHON")
    if not named:
        pytest.skip("no environment of SGLang with CUDA: set R1MEGA_SGLANG_PYTHON to its interpreter")
    assert Path(named).exists(), f"R1MEGA_SGLANG_PYTHON: {named} is not there"
    return Path(named)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def qwen2(checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    return checkpoint("qwen2"), checkpoint("qwen2", seed=1)


@pytest.fixture(scope="module")
def fleet(qwen2, sglang_python, tmp_path_factory) -> Iterator[Servers]:
    options = {
        "rollout__engines": 1, "sglang__transport": Transport.ipc, "sglang__release": True,
        "sglang__max_cached_tokens": CACHED, "sglang__memory_fraction": 0.4, "sglang__restarts": 5,
    }  # fmt: skip
    with servers(qwen2[0], tmp_path_factory.mktemp("fleet") / "run", sglang_python, **options) as made:
        began = time.monotonic()
        made.client(patience_seconds=120.0).wait_until_ready()
        show("a server starts in s", time.monotonic() - began)
        yield made
        assert made.fault is None


@pytest.fixture(scope="module")
def client(fleet: Servers) -> SglangEngines:
    return fleet.client(patience_seconds=120.0)


@pytest.fixture(scope="module")
def publish(client: SglangEngines, qwen2, alone) -> Callable[..., None]:
    """`publish(checkpoint, version, share=1.0)` over handles of the GPU's memory."""
    fields = hf_fields.read(qwen2[0])
    plan = PublishPlan(fields, Layout(), [EngineLayout()], dtype="fp32", bucket_bytes=100_000)
    exchange = Exchange(plan, 0, 1, torch.device(DEVICE), in_shared_memory=True)

    def send(checkpoint: Path, version: int, share: float = 1.0) -> None:
        proof = PublishProof(fields, EngineLayout(), build_of("cuda", ()), torch.float32, share)
        shards = [(slot, index, shard.to(DEVICE)) for slot, index, shard in exporting(checkpoint).shards()]
        IpcPublisher(exchange, client, proof, alone).publish(SimpleNamespace(shards=lambda: shards), version)

    return send


def show(what: str, value: object) -> None:
    """A figure, in the output of `pytest -s` or of the test that fails."""
    print(f"FIGURE {what}: {value:.3g}" if isinstance(value, float) else f"FIGURE {what}: {value}")


def device_used() -> float:
    """GB that all processes hold on the GPU."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def asked(count: int = 4, num_samples: int = 1) -> list[Request]:
    return [Request(i, PROMPTS[i % len(PROMPTS)], num_samples) for i in range(count)]


def greedy_of_transformers(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def largest_gap(directory: Path, found: list[Completion]) -> float:
    """Between the log-probs that came with the samples and those of a forward over them on the CPU."""
    engine = EmbeddedEngine(directory)
    engine.load(exporting(directory).export_hf(wanted=True), 0)
    sequences = [[*PROMPTS[c.key % len(PROMPTS)], *c.token_ids] for c in found]
    return max(
        abs(given - other)
        for c, values in zip(found, engine.logprobs(sequences), strict=True)
        for given, other in zip(c.logprobs, values[-len(c.token_ids) :], strict=True)
    )


def check_served(client: SglangEngines, checkpoint: Path, version: int) -> None:
    found = client.generate(asked(), SAMPLED)
    gap = largest_gap(checkpoint, found)
    show("largest gap of log-probs", gap)
    assert {c.weight_version for c in found} == {version} and gap < TOLERANCE


def test_it_says_what_transformers_says(client: SglangEngines, publish, qwen2) -> None:
    """Of weights that came over CUDA's handles, every parameter's checksum compared; token for token."""
    for version, checkpoint in ((1, qwen2[0]), (2, qwen2[1])):
        began = time.monotonic()
        publish(checkpoint, version)
        show("publish of a tiny model with checksums, s", time.monotonic() - began)
        found = client.generate(asked(), SamplingParams(max_tokens=40, temperature=0.0))
        assert [c.token_ids for c in found] == greedy_of_transformers(checkpoint)
        check_served(client, checkpoint, version)
    other = largest_gap(qwen2[0], client.generate(asked(), SAMPLED))
    assert other > 0.1, "the comparison does not see other weights"


def test_memory_given_back_is_free(client: SglangEngines, publish, qwen2) -> None:
    """Cache and weights are given back, and taken again; the device says so."""
    publish(qwen2[0], 3)
    memory, used = ServerMemory(client, 100.0), {"all held": device_used()}
    memory.hold(())
    used["nothing held"] = device_used()
    memory.hold((WEIGHTS,))
    used["weights held"] = device_used()
    publish(qwen2[1], 4)
    memory.hold(EVERYTHING)
    used["all held again"] = device_used()
    show("GB of the device in use", {name: round(value, 2) for name, value in used.items()})
    assert used["all held"] - used["nothing held"] > 0.95 * CACHED * 1024 / 1e9
    assert abs(used["all held again"] - used["all held"]) < 0.3
    check_served(client, qwen2[1], 4)


def test_two_rounds_on_one_gpu(checkpoint, tmp_path, sglang_python) -> None:
    """Trainer and server take turns with the GPU's memory."""
    questions = tmp_path / "train.jsonl"
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"#### {a + b}"} for a in range(6) for b in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = test_runs.train(
        checkpoint("qwen2"), questions, tmp_path / "run", sglang_python, "device=cuda", "rollout.engines=1",
        "sglang.transport=ipc", "sglang.release=true", "memory.offload=true", f"sglang.max_cached_tokens={CACHED}",
        "sglang.memory_fraction=0.4",
    )  # fmt: skip
    gaps = [row["sync/logprob_gap_max"] for row in rows if "sync/logprob_gap_max" in row]
    rounds = [row for row in rows if "time/rollout" in row]
    show("largest gap of log-probs of each round", gaps)
    assert len(gaps) == len(rounds) == 2 and 0 < max(gaps) <= TOLERANCE
    assert all(0 < row["sync/probe_gap_max"] <= TOLERANCE for row in rounds)
    for row in rounds:
        show("memory, GB", {name: round(value, 2) for name, value in row.items() if name.startswith("memory/")})
        show("seconds", {name: round(value, 2) for name, value in row.items() if name.startswith("time/")})
        held = row["memory/rollout/device_used_after"] - row["memory/train/device_used_before"]
        assert held > 0.9 * CACHED * 1024 / 1e9, "the server kept its cache while the trainer computed"


def once(damage: Callable[[dict[str, torch.Tensor]], None], times: int = 1) -> Callable[..., str]:
    """payload_of, which damages what it hands over as often as that; the trainer's checksums are made before."""
    real, left = ipc.payload_of, [times]

    def payload_of(tensors: dict[str, torch.Tensor]) -> str:
        if NAME in tensors and left[0]:
            left[0] -= 1
            damage(tensors)
            torch.cuda.synchronize()
        return real(tensors)

    return payload_of


def flip(tensors: dict[str, torch.Tensor]) -> None:
    """One bit of one weight."""
    tensors[NAME].view(torch.int32).view(-1)[250] ^= 1


def shift(tensors: dict[str, torch.Tensor]) -> None:
    """One number of one matrix."""
    tensors[NAME].view(-1)[0] += 0.5


def test_one_flipped_bit_is_found(client, publish, qwen2, monkeypatch, capsys) -> None:
    """And published once more; the second time is the last."""
    monkeypatch.setattr(ipc, "payload_of", once(flip))
    publish(qwen2[0], 5)
    assert f"engine 0 rank 0: {PARAM}: the engine's is not what was published" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(ipc, "payload_of", once(flip, times=2))
    with pytest.raises(PublishError, match="weights 6 did not arrive, published twice"):
        publish(qwen2[1], 6)
    monkeypatch.undo()
    publish(qwen2[0], 7)
    check_served(client, qwen2[0], 7)


def trainers_logprobs(checkpoint: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    for tokens in PROMPTS:
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
    return found


def test_the_probe_finds_one_wrong_weight(client, publish, qwen2, alone, monkeypatch, capsys) -> None:
    """Where no checksum is asked for."""
    probe = PublishProbe(PROMPTS, lambda tokens: {"engine": client.logprobs_of_each(tokens)[0]}, "fp32", alone)
    monkeypatch.setattr(ipc, "payload_of", once(shift))

    def send() -> list[str]:
        publish(qwen2[1], 8, share=0.0)
        return probe.faults(trainers_logprobs(qwen2[1]))

    publish_twice(send, 8, speaks=True)
    assert "weights 8 did not arrive, publishing again: engine: its log-probs" in capsys.readouterr().err
    show("largest gap of the probe", probe.metrics["sync/probe_gap_max"])
    assert probe.metrics["sync/probe_gap_max"] < TOLERANCE


def test_a_publish_that_is_skipped_is_found(client, publish, qwen2, monkeypatch) -> None:
    """The version moves on and the weights do not."""
    monkeypatch.setattr(SglangEngines, "update_from_tensors", lambda self, payloads: None)
    with pytest.raises(PublishError, match=r"engine 0 rank 0: model.embed_tokens.weight: "):
        publish(qwen2[0], 9)


def test_a_server_killed_in_mid_rollout(fleet: Servers, client, qwen2, alone) -> None:
    """It is started again with the weights that are due, and every sequence comes back once."""
    fields = hf_fields.read(qwen2[0])
    disk_publisher(fleet, client, fields, EngineLayout(), alone).publish(exporting(qwen2[0]), 10)
    engine, seen, requests = fleet.engines[0], [], asked(60, 4)
    starts = engine.starts

    def kill_in_time() -> None:
        while len(seen) < 60:
            time.sleep(0.01)
        kill(engine)

    thread = threading.Thread(target=kill_in_time, daemon=True)
    thread.start()
    found = client.generate(requests, SamplingParams(max_tokens=64), seen.append)
    thread.join(10)
    assert engine.starts == starts + 1
    assert [(c.key, c.index) for c in found] == [(r.key, i) for r in requests for i in range(r.num_samples)]
    assert Counter((c.key, c.index) for c in seen) == Counter((c.key, c.index) for c in found)
    assert {c.weight_version for c in found} == {10} and largest_gap(qwen2[0], found[-40:]) < TOLERANCE


def test_publish_rate(sglang_python, tmp_path) -> None:
    """Of a model of some GB to a server, beside a copy on the device; its weights are given back besides."""
    argv = [sys.executable, "-m", "benchmarks.publish_cuda", "--gigabytes", "3", "--rounds", "2", "--server"]
    argv += [str(sglang_python), "--json", str(tmp_path / "found.json")]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=140, cwd=REPO)
    print(result.stdout, result.stderr[-3000:])
    assert result.returncode == 0
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    show("publish, GB/s", {name: round(rate, 2) for name, rate in found["gb_per_s"].items()})
    show("GB of the device in use", {name: round(value, 2) for name, value in found["device_used"].items()})
    assert found["device_used"]["all held"] - found["device_used"]["nothing held"] > found["bytes"] / 1e9
