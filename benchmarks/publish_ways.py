"""What benchmarks/publish.py times: one trainer rank's publishes, and the plain ways to move as many bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.synthetic_checkpoint import choose_shape, config_of
from r1mega.models import hf_fields
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout
from r1mega.types import NamedTensors
from r1mega.weights.disk import DiskPublisher
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.exchange import Exchange
from r1mega.weights.ipc import IpcPublisher
from r1mega.weights.plan import PublishPlan
from r1mega.weights.proof import PublishProof, build_of
from r1mega.weights.shelf import Shelf


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


class Hashing(PublishProof):
    """Hashes everything, and takes any answer: there is nobody to ask."""

    def faults(self, expected: Mapping[int, Mapping[str, str]], answers: Sequence[Mapping[str, Any]]) -> list[str]:
        assert expected and all(expected.values())
        return []


class Ways:
    """A rank of the world that RANK and WORLD_SIZE name, with its half of the experts and all the rest."""

    def __init__(self, gigabytes: float, folder: Path, num_ranks: int, bucket_bytes: int) -> None:
        layout = Layout.of(tp=1, cp=1, pp=1, vpp=1, ep=num_ranks, etp=1, dp=num_ranks, stages=None)
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
        self._ipc = IpcPublisher(exchange, servers, proof, world.control)
        self._disk = DiskPublisher(self._place, servers, fields, "bf16", proof, world.control)
        self.model_bytes = sum(plan.nbytes_of(slot) for slot in plan.slots)
        self.handed_bytes = sum(message.nbytes for rank in range(num_ranks) for message in plan.sends_of(rank))
        self._buffer = torch.zeros(bucket_bytes, dtype=torch.uint8)
        self._disk.publish(self, 0)  # for cp to have something to copy

    def export_hf(self, *, wanted: bool = True) -> NamedTensors:
        """As MegatronPolicy's."""
        return self._sharded.gather(wanted=wanted)

    def shards(self) -> list[tuple[Any, int, torch.Tensor]]:
        """As MegatronPolicy's."""
        return self._sharded.local

    def all(self) -> dict[str, Callable[[], None]]:
        """Every way by its name."""
        return {
            "broadcast": self._broadcast,
            "ipc": lambda: self._ipc.publish(self, 0),
            "cp": self._copy,
            "disk": lambda: self._disk.publish(self, 0),
        }

    def tidy(self) -> None:
        """Remove what `cp` wrote."""
        if self.rank == 0:
            shutil.rmtree(self._folder / "copy")

    def close(self) -> None:
        """Leave the world."""
        groups.shutdown()

    def _broadcast(self) -> None:
        size = self._buffer.numel()
        for begin in range(0, self.model_bytes, size):
            dist.broadcast(self._buffer[: min(size, self.model_bytes - begin)], src=0)

    def _copy(self) -> None:
        if self.rank == 0:
            subprocess.run(["cp", "-r", self._place.path(0), self._folder / "copy"], check=True)
