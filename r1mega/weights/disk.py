"""Publish through a file system: all ranks write a checkpoint together, every server loads it.

The version published last stays where it is until the next one is loaded everywhere, so that a server that is started
again finds the weights that are due.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from r1mega.parallel.collectives import gather, share
from r1mega.types import EngineRefused, Servers, TrainerWeights
from r1mega.weights.proof import PublishProof, publish_twice
from r1mega.weights.shelf import Shelf
from r1mega.weights.spread import SpreadWriter


class DiskPublisher:
    """Writes with all ranks; the one that speaks to the servers has them load.

    Args:
        servers: on that rank, rank 0 of the group; None on the others.
        writer: this rank's part in writing, whose plan keeps together what `proof` hashes as one.
        proof: what the servers have to report, on every rank.
        group: all ranks, for objects.
    """

    def __init__(
        self, place: Shelf, servers: Servers | None, writer: SpreadWriter, proof: PublishProof, group: dist.ProcessGroup
    ) -> None:
        self._place, self._servers, self._writer, self._proof, self._group = place, servers, writer, proof, group
        self._tensors = writer.plan.tensors_of(writer.rank)

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where the servers report other weights a second time, WriteError where a rank
        could not write, and ValueError, before a server hears of it, for a shard that is none of the model's.
        """
        publish_twice(lambda: self._once(weights, version), version, speaks=self._servers is not None)

    def _once(self, weights: TrainerWeights, version: int) -> list[str]:
        """What went wrong, the same on every rank."""
        path = self._place.path(version)
        expected = self._proof.expect(version, tensors=self._tensors)
        self._writer.write(weights.shards(), path, expected)
        parts = gather(expected.results(), self._group)
        faults: list[str] = []
        if self._servers is not None:
            self._place.set_newest(version)
            try:
                self._servers.load_from_disk(str(path), version)
                if self._proof.share:
                    digests = self._proof.merged(parts, version)
                    faults = self._proof.faults(digests, self._servers.checksums())
            except EngineRefused as error:
                faults = [str(error)]
            else:
                if not faults:
                    self._writer.after(partial(self._place.drop_others, version))
        return share(faults, self._group)
