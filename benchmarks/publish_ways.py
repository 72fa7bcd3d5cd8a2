"""What benchmarks/publish.py times: one trainer rank's publishes, and the plain ways to move as many bytes."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.synthetic_checkpoint import choose_shape, config_of
from r1mega.models import hf_fields
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout
from r1mega.parallel.outside import OutsideGroup
from r1mega.types import GroupAddress, TensorShape
from r1mega.weights.disk import DiskPublisher
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.exchange import Exchange
from r1mega.weights.gathering import Gathering
from r1mega.weights.ipc import IpcPublisher
from r1mega.weights.plan import PublishPlan
from r1mega.weights.process_group import GroupPublisher, plan_for
from r1mega.weights.proof import PublishProof, build_of
from r1mega.weights.shelf import Shelf
from r1mega.weights.spread import SpreadWriter
from r1mega.weights.write_plan import WritePlan


class Silent:
    """Servers that take everything at once."""

    def load_from_disk(self, directory: str, version: int) -> None:
        """Read nothing."""

    def begin_update(self) -> None:
        """Be ready."""

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Open no handle."""

    def end_update(self, version: int) -> None:
        """Serve nothing."""

    def checksums(self) -> list[dict[str, Any]]:
        """Say nothing."""
        return []


class Receiving(Silent):
    """Servers whose ranks are processes of their own: they receive as SGLang does, and then drop it."""

    urls = ("http://127.0.0.1:1",)

    def __init__(self, num_ranks: int) -> None:
        self._version = "default"
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            context.Process(target=receive, args=(theirs, rank), daemon=True).start()
            self._pipes.append(ours)

    def weight_versions(self) -> list[str]:
        """Of the one server."""
        return [self._version]

    def end_update(self, version: int) -> None:
        """Serve nothing, under this version."""
        self._version = str(version)

    def join_group(self, address: GroupAddress, first_ranks: Sequence[int]) -> None:
        """All ranks, which wait until rank 0 is there."""
        self._ask("join", (address, first_ranks[0]))

    def leave_groups(self, names: Sequence[str]) -> None:
        """They end with this process."""

    def update_from_group(self, name: str, tensors: Sequence[TensorShape]) -> None:
        """Receive tensors, one by one."""
        sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in tensors]
        self._ask("update", (name, sizes))

    def _ask(self, what: str, argument: Any) -> None:
        for pipe in self._pipes:
            pipe.send((what, argument))
        for pipe in self._pipes:
            pipe.recv()


def receive(pipe: Connection, rank: int) -> None:
    """A rank's life. It meets the others as SGLang 0.5.21's `init_custom_process_group` does."""
    from torch.distributed import distributed_c10d as c10d

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    joined, buffer = {}, torch.empty(0, dtype=torch.uint8)
    with contextlib.suppress(EOFError):
        while True:
            what, argument = pipe.recv()
            if what == "join":
                address, first = argument
                limit = timedelta(minutes=5)
                place = f"tcp://{address.host}:{address.port}"
                store, own, size = next(c10d.rendezvous(place, first + rank, address.size, timeout=limit))
                store = dist.PrefixStore(address.name, store)
                group, _ = c10d._new_process_group_helper(
                    size, own, [], dist.Backend("gloo"), store, group_name=address.name, timeout=limit
                )
                c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
                joined[address.name] = group
            else:
                name, sizes = argument
                if buffer.numel() < sum(sizes):
                    buffer = torch.zeros(sum(sizes), dtype=torch.uint8)
                parts = buffer[: sum(sizes)].split(sizes)
                works = [dist.broadcast(part, src=0, group=joined[name], async_op=True) for part in parts]
                for work in works:
                    work.wait()
            pipe.send(None)


class Hashing(PublishProof):
    """Hashes everything, and takes any answer: there is nobody to ask."""

    def faults(self, expected: Mapping[int, Mapping[str, str]], answers: Sequence[Mapping[str, Any]]) -> list[str]:
        assert expected and all(expected.values())
        return []


class Ways:
    """A rank of the world that RANK and WORLD_SIZE name, with its part of the model in a layout of `num_ranks`."""

    def __init__(self, gigabytes: float, folder: Path, trainer: str, num_ranks: int, bucket_bytes: int) -> None:
        layout = Layout.parse(trainer)
        world = groups.initialize(layout, "cpu", seed=0, timeout_minutes=10)
        # Megatron may be imported only now: the device bridge is laid.
        from r1mega.models.build import build_chunks
        from r1mega.models.hf_config import ModelOptions
        from r1mega.models.hf_io import RandomWeights
        from r1mega.models.shard import ShardedModel

        self.rank, self._folder, self._place = world.rank, folder, Shelf(folder / "shelf")
        if self.rank == 0:
            self._place.prepare()
            self._place.model.mkdir()
            config = config_of(*choose_shape(int(gigabytes * 1e9)), is_fp8=False) | {"initializer_range": 0.02}
            (self._place.model / "config.json").write_text(json.dumps(config))
        dist.barrier()
        fields = hf_fields.read(self._place.model)
        chunks = build_chunks(fields, world, ModelOptions(params_dtype=torch.bfloat16))
        self._sharded = ShardedModel(chunks, fields, world, "torch")
        self._sharded.fill(RandomWeights(fields, 0))
        engine = EngineLayout(tp=num_ranks, ep=num_ranks)
        plan = PublishPlan(fields, layout, [engine], dtype="bf16", bucket_bytes=bucket_bytes)
        exchange = Exchange(plan, self.rank, num_ranks, world.device, in_shared_memory=True)
        servers = Silent() if self.rank == 0 else None
        proof = Hashing(fields, engine, build_of("cpu", ()), torch.bfloat16, 1.0)
        self._receiving = self._outside = None
        if self.rank == 0:
            self._receiving = Receiving(num_ranks)
            self._aside = ThreadPoolExecutor(1)
            self._outside = OutsideGroup("plain", 1 + num_ranks, "gloo", seconds=300, step_seconds=300)
            address = GroupAddress("plain", "127.0.0.1", self._outside.port, 1 + num_ranks, "gloo")
            joined = self._aside.submit(self._receiving.join_group, address, [1])
            self._outside.meet()
            joined.result()
        sent = plan_for(fields, layout, proof, serves="bf16", held="bf16", backend="gloo", turn_bytes=bucket_bytes)
        self._gloo = GroupPublisher(
            Gathering(sent, self.rank, world.device),
            self._receiving,
            proof,
            world.control,
            num_ranks=[num_ranks],
            backend="gloo",
            seconds=300,
        )
        self._ipc = IpcPublisher(exchange, servers, proof, world.control)
        written = WritePlan(
            fields, layout, serves="bf16", held="bf16", together=proof.together(), turn_bytes=bucket_bytes // 4
        )
        self._writer = SpreadWriter(written, self.rank, world.device, self._place.model, world.control)
        self._disk = DiskPublisher(self._place, servers, self._writer, proof, world.control)
        self.model_bytes = sum(plan.nbytes_of(slot) for slot in plan.slots)
        self.handed_bytes = sum(message.nbytes for rank in range(num_ranks) for message in plan.sends_of(rank))
        self._buffer = torch.zeros(bucket_bytes, dtype=torch.uint8)
        self._disk.publish(self, 0)  # for cp to have something to copy

    def shards(self) -> list[tuple[Any, int, torch.Tensor]]:
        """As MegatronPolicy's."""
        return self._sharded.local

    def all(self) -> dict[str, Callable[[], None]]:
        """Every way by its name."""
        return {
            "broadcast": self._broadcast,
            "receivers": self._broadcast_outside,
            "gloo": lambda: self._gloo.publish(self, 0),
            "ipc": lambda: self._ipc.publish(self, 0),
            "cp": self._copy,
            "disk": lambda: self._disk.publish(self, 0),
        }

    def tidy(self) -> None:
        """Remove what `cp` wrote, and wait for what `disk` replaced to be removed."""
        self._writer.settle()
        if self.rank == 0:
            shutil.rmtree(self._folder / "copy", ignore_errors=True)

    def close(self) -> None:
        """Leave the world."""
        groups.shutdown()

    def _broadcast(self) -> None:
        size = self._buffer.numel()
        for begin in range(0, self.model_bytes, size):
            dist.broadcast(self._buffer[: min(size, self.model_bytes - begin)], src=0)

    def _broadcast_outside(self) -> None:
        if self._outside is None:
            return
        size = self._buffer.numel()
        for begin in range(0, self.model_bytes, size):
            nbytes = min(size, self.model_bytes - begin)
            told = self._aside.submit(self._receiving.update_from_group, "plain", [("", "uint8", (nbytes,))])
            self._outside.send([self._buffer[:nbytes]])
            self._outside.wait()
            told.result()

    def _copy(self) -> None:
        if self.rank == 0:
            subprocess.run(["cp", "-r", self._place.path(0), self._folder / "copy"], check=True)
