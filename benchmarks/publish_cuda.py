"""A publish by handles of memory on one GPU beside a plain copy of the same bytes on that GPU.

    python -m benchmarks.publish_cuda --gigabytes 4 --rounds 5 --json publish_cuda.json
    python -m benchmarks.publish_cuda --gigabytes 4 --rounds 5 --server SGLANG_PYTHON

One trainer process holds a deepseek_v3 model of random numbers in BF16 and publishes it by `ipc` to one engine rank, a
process of its own on the same GPU. That process opens the handles as an engine does, and copies every tensor into
memory of its own. Measured are, in turn:

copy       the trainer copies as many bytes as the model has from one place of the GPU to another
handles    publish without checksums
checksums  publish with the checksum of every parameter, which the engine would have to report

After the first publish the engine's copies are compared with the trainer's weights, every byte, by their checksum; with
one number of one tensor changed, they must differ. The exit code is 0 where that holds, 1 where not. Rates are of the
model's bytes. Needs a GPU.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from benchmarks.synthetic_checkpoint import choose_shape, config_of
from r1mega.launch.local import worker_env
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

BUCKET_BYTES = 1 << 28


class Engine:
    """One engine rank in a process of its own, as a publisher sees a server."""

    urls = ("http://127.0.0.1:1",)

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()

    def begin_update(self) -> None:
        """Always ready."""

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over the handles; returns when the engine has copied."""
        self._ask(payloads[0][0])

    def end_update(self, version: int) -> None:
        """Nothing is served."""

    def checksums(self) -> list[dict]:
        """Not asked for: `Unasked` compares nothing."""
        return []

    def sums(self) -> dict[str, int]:
        """Of each tensor that was copied a checksum of its bytes."""
        return self._ask(None)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)

    def _ask(self, what: str | None) -> dict[str, int] | None:
        self._pipe.send(what)
        if not self._pipe.poll(120):
            raise TimeoutError("the engine process has not answered for 120 s")
        return self._pipe.recv()


def serve(pipe: Connection) -> None:
    """The engine's life: copy what the handles name into tensors of its own."""
    from r1mega.train.policy import checksum

    own: dict[str, torch.Tensor] = {}
    with contextlib.suppress(EOFError):
        while True:
            payload = pipe.recv()
            if payload is None:
                pipe.send({name: checksum(tensor) for name, tensor in own.items()})
                continue
            for name, tensor in pickle.loads(base64.b64decode(payload)):
                own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            torch.cuda.synchronize()
            pipe.send(None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the model in BF16 (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--server", type=Path, help="Python of SGLang's environment: publish to a real server")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"publish_cuda: no CUDA device: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    os.environ |= worker_env("cuda", 1) | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    found = measure(options.gigabytes, options.rounds, options.server)
    rates = {name: found["bytes"] / median(seconds) / 1e9 for name, seconds in found["seconds"].items()}
    print(f"{torch.cuda.get_device_name()}; model {found['bytes'] / 1e9:.2f} GB, the same after: {found['same']}")
    for name, rate in rates.items():
        print(f"{name:10} {median(found['seconds'][name]):8.4f} s {rate:8.1f} GB/s {rate / rates['copy']:6.3f} of copy")
    if options.server:
        print("GB of the device in use: " + ", ".join(f"{k} {v:.2f}" for k, v in found["device_used"].items()))
    if options.json:
        options.json.write_text(json.dumps(found | {"gb_per_s": rates}, indent=2) + "\n")
    return 0 if found["same"] and found["notices"] else 1


def measure(gigabytes: float, rounds: int, python: Path | None = None) -> dict:
    """Seconds of each way and round, and whether the engine had what the trainer has."""
    from benchmarks import publish_server

    layout = Layout.of(tp=1, cp=1, pp=1, vpp=1, ep=1, etp=1, dp=1, stages=None)
    world = groups.initialize(layout, "cuda", seed=0, timeout_minutes=5)
    sharded = random_model(gigabytes, world)
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.exchange import Exchange
    from r1mega.weights.ipc import IpcPublisher
    from r1mega.weights.plan import PublishPlan
    from r1mega.weights.proof import PublishProof, build_of

    class Unasked(PublishProof):
        """Hashes what it is told to, and takes any answer: this engine computes no checksums."""

        def faults(self, expected, answers):
            return []

    class Weights:
        """As MegatronPolicy's."""

        def shards(self):
            return sharded.local

    fields, engine = sharded.fields, EngineLayout(tp=1, ep=1)
    receives = publish_server.started(python, sharded.config) if python else Engine()
    compare = publish_server.compared if python else compared
    plan = PublishPlan(fields, layout, [engine], dtype="bf16", bucket_bytes=BUCKET_BYTES)
    exchange = Exchange(plan, 0, 1, world.device, in_shared_memory=True)

    def publisher(share: float) -> Callable[[], None]:
        kind = PublishProof if python else Unasked
        proof = kind(fields, engine, build_of("cuda", ()), torch.bfloat16, share)
        publish = IpcPublisher(exchange, receives, proof, world.control).publish
        return lambda: publish(Weights(), 0)

    nbytes = sum(message.nbytes for message in plan.sends_of(0))
    ways = {"copy": copies_of(nbytes, world.device), "handles": publisher(0.0), "checksums": publisher(1.0)}
    ways["checksums"]()
    same, notices = compare(sharded, receives, ways["checksums"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            torch.cuda.synchronize()
            began = time.monotonic()
            way()
            torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.monotonic() - began)
    used = publish_server.given_back(receives) if python else {}
    receives.close()
    groups.shutdown()
    return {"bytes": nbytes, "same": same, "notices": notices, "seconds": seconds, "device_used": used}


def random_model(gigabytes: float, world: groups.Groups):
    """A deepseek_v3 of random numbers in BF16 as one rank holds it; its `fields` besides."""
    from r1mega.models import hf_fields
    from r1mega.models.build import build_chunks
    from r1mega.models.hf_config import ModelOptions
    from r1mega.models.shard import ShardedModel

    with tempfile.TemporaryDirectory(prefix="r1mega-publish-") as folder:
        config = config_of(*choose_shape(int(gigabytes * 1e9)), is_fp8=False) | {"initializer_range": 0.02}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        fields = hf_fields.read(folder)
    chunks = build_chunks(fields, world, ModelOptions(params_dtype=torch.bfloat16))
    sharded = ShardedModel(chunks, fields, world, "torch")
    with torch.no_grad():
        for _, _, parameter in sharded.local:
            parameter.normal_(std=0.02)
    sharded.fields, sharded.config = fields, config
    return sharded


def copies_of(nbytes: int, device: torch.device) -> Callable[[], None]:
    """What copies so many bytes from one place of the GPU to another."""
    source, target = (torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for begin in range(0, nbytes, BUCKET_BYTES):
            size = min(BUCKET_BYTES, nbytes - begin)
            target[:size].copy_(source[:size])

    return copy


def compared(sharded, receives: Engine, _publish: Callable[[], None]) -> tuple[bool, bool]:
    """Whether the engine's tensors are the trainer's byte for byte; and whether a changed one would be seen."""
    from r1mega.train.policy import checksum

    trainer = {name: checksum(tensor.to(torch.bfloat16)) for name, tensor in sharded.gather()}
    theirs = {name: value for name, value in receives.sums().items() if not name.endswith("e_score_correction_bias")}
    same = bool(theirs) and all(trainer[name] == value for name, value in theirs.items())
    name, tensor = next((name, tensor) for name, tensor in sharded.gather() if name in theirs)
    changed = tensor.to(torch.bfloat16).clone()
    changed.view(-1)[0] += 1
    return same, checksum(changed) != theirs[name]


if __name__ == "__main__":
    sys.exit(main())
