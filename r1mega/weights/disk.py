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
from r1mega.weights.exchange import DTYPES
from r1mega.weights.proof import PublishProof, publish_twice
from r1mega.weights.shelf import Shelf
from r1mega.weights.slices import dtype_of


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
        named = {tensor.name: (slot, tensor) for slot in slots_of(fields) for tensor in (*slot.tensors, *slot.aliases)}
        self._shapes = {name: tensor.shape for name, (_, tensor) in named.items()}
        self._dtypes = {name: DTYPES[dtype_of(slot, tensor, dtype)] for name, (slot, tensor) in named.items()}

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where the servers report other weights a second time, and ValueError, before
        a server hears of it, for a tensor that is none of the model's: SGLang skips a name that it does not know, and a
        shape that it does not expect ends it.
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
            self._check(name, tensor)
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

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._shapes.get(name)
        if expected is None:
            raise ValueError(f"publish: {name} is no tensor of the model that config.json describes")
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"publish: {name} has shape {list(tensor.shape)}; config.json makes it {list(expected)}")
