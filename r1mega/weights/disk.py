"""Publish through a file system: one rank writes a checkpoint, every server loads it.

The version published last stays where it is until the next one is loaded everywhere, so that a server that is started
again finds the weights that are due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.models.hf_io import CheckpointWriter
from r1mega.models.tables import slots_of
from r1mega.parallel.collectives import share
from r1mega.types import Export, Servers
from r1mega.weights.shelf import Shelf
from r1mega.weights.slices import dtype_of

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# (tensors by name as they were sent) -> what the servers hold instead, in words; none where all is as sent.
Check = Callable[[Mapping[str, torch.Tensor]], list[str]]


class PublishError(RuntimeError):
    """The servers do not hold what was published, twice in a row."""


class DiskPublisher:
    """Writes and loads on the rank that speaks to the servers; the others take part in gathering.

    Args:
        servers: on that rank, rank 0 of the group; None on the others.
        dtype: that the servers hold weights in, "fp32" or "bf16". What is always kept in fp32 stays so.
        group: all ranks, for objects.
    """

    def __init__(
        self, place: Shelf, servers: Servers | None, fields: HfFields, dtype: str, group: dist.ProcessGroup
    ) -> None:
        self._place, self._servers, self._group = place, servers, group
        self._dtypes = {
            tensor.name: _TORCH_DTYPES[dtype_of(slot, tensor, dtype)]
            for slot in slots_of(fields)
            for tensor in (*slot.tensors, *slot.aliases)
        }

    def publish(self, export: Export, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where the servers report other weights a second time.
        """
        faults: list[str] = []
        for _ in range(2):
            faults = share(self._once(export, version), self._group)
            if not faults:
                return
        raise PublishError(f"weights of version {version} did not arrive: {'; '.join(faults)}")

    def _once(self, export: Export, version: int) -> list[str]:
        tensors = export(wanted=self._servers is not None)
        if self._servers is None:
            for _ in tensors:
                raise AssertionError("a rank that speaks to no server asked for tensors")
            return []
        writer = CheckpointWriter(self._place.path(version), source=self._place.model, dtypes=self._dtypes)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.close()
        self._place.set_newest(version)
        self._servers.load_from_disk(str(self._place.path(version)), version)
        self._place.drop_others(version)
        return []
