"""Publish through a file system: one rank writes a checkpoint, every server loads it.

The version published last stays where it is until the next one is loaded everywhere, so that a server that is started
again finds the weights that are due.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.models.hf_io import CheckpointWriter
from r1mega.models.tables import slots_of
from r1mega.parallel.collectives import share
from r1mega.types import EngineRefused, Servers, TrainerWeights
from r1mega.weights.proof import PublishProof, publish_twice
from r1mega.weights.shelf import Shelf
from r1mega.weights.slices import dtype_of

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DiskPublisher:
    """Writes and loads on the rank that speaks to the servers; the others take part in gathering.

    Args:
        servers: on that rank, rank 0 of the group; None on the others.
        dtype: that the servers hold weights in, "fp32" or "bf16". What is always kept in fp32 stays so.
        proof: what the servers have to report, on the rank that speaks to them.
        group: all ranks, for objects.
    """

    def __init__(
        self,
        place: Shelf,
        servers: Servers | None,
        fields: HfFields,
        dtype: str,
        proof: PublishProof | None,
        group: dist.ProcessGroup,
    ) -> None:
        self._place, self._servers, self._proof, self._group = place, servers, proof, group
        self._dtypes = {
            tensor.name: _TORCH_DTYPES[dtype_of(slot, tensor, dtype)]
            for slot in slots_of(fields)
            for tensor in (*slot.tensors, *slot.aliases)
        }

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where the servers report other weights a second time.
        """
        publish_twice(
            lambda: share(self._once(weights, version), self._group), version, speaks=self._servers is not None
        )

    def _once(self, weights: TrainerWeights, version: int) -> list[str]:
        tensors = weights.export_hf(wanted=self._servers is not None)
        if self._servers is None:
            for _ in tensors:
                raise AssertionError("a rank that speaks to no server asked for tensors")
            return []
        assert self._proof is not None
        expectation = self._proof.expect(version)
        path = self._place.path(version)
        writer = CheckpointWriter(path, source=self._place.model, dtypes=self._dtypes)
        for name, tensor in tensors:
            expectation.add(name, tensor)
            writer.add(name, tensor)
        writer.close()
        self._place.set_newest(version)
        try:
            self._servers.load_from_disk(str(path), version)
            faults = self._proof.faults(expectation.results(), self._servers.checksums()) if self._proof.share else []
        except EngineRefused as error:
            return [str(error)]
        self._place.drop_others(version)
        return faults
