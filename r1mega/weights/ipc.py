"""Publish by handing memory over: the trainer rank beside an engine rank gives it handles of whole tensors.

On CUDA the handles are of device memory on the same GPU, on CPU of shared memory on the same machine. Each engine rank
is handed what it needs and no more (`plan`), a bucket at a time. Nothing is written to a disk, so a server that is
started again has no weights until the next publish.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing

from r1mega.parallel.collectives import gather
from r1mega.types import Servers, TrainerWeights
from r1mega.weights.exchange import Exchange, Parcel
from r1mega.weights.proof import Expectation, PublishProof, publish_twice, speaker


class IpcPublisher:
    """Hands weights to servers on this machine.

    Args:
        servers: on the rank that speaks to them, rank 0 of the group; None on the others.
        proof: what the servers have to report, on every rank.
        group: all ranks, for objects.
    """

    def __init__(
        self, exchange: Exchange, servers: Servers | None, proof: PublishProof, group: dist.ProcessGroup
    ) -> None:
        self._exchange, self._servers, self._proof, self._group = exchange, servers, proof, group
        self._speak = speaker(servers, group)
        # What another process opens by name: a file descriptor could not travel over HTTP.
        torch.multiprocessing.set_sharing_strategy("file_system")

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where it fails a second time.
        """
        publish_twice(lambda: self._once(weights, version), version, speaks=self._servers is not None)

    def _once(self, weights: TrainerWeights, version: int) -> list[str]:
        """What went wrong, the same on every rank."""
        expected = self._proof.expect(version, self._ranks_to_hash())
        faults = self._speak(lambda servers: servers.begin_update())
        if faults:
            return faults
        for parcels in self._exchange.buckets(weights.shards()):
            for parcel in parcels:
                self._note(expected, parcel)
            handed = gather({parcel.receiver: payload_of(parcel.tensors) for parcel in parcels}, self._group)
            faults = self._speak(lambda servers, handed=handed: servers.update_from_tensors(self._payloads(handed)))
            if faults:
                return faults
        digests = {rank: found for part in gather(expected.results(), self._group) for rank, found in part.items()}
        faults = self._speak(lambda servers: servers.end_update(version))
        if faults or not self._proof.share:
            return faults
        return self._speak(lambda servers: self._proof.faults(digests, servers.checksums()))

    def _ranks_to_hash(self) -> list[int]:
        """Ranks of the first engine whose courier this is; all engines are handed the same."""
        places = self._exchange.plan.receivers.places
        return [rank for engine, rank in (places[index] for index in self._exchange.mine) if engine == 0]

    def _note(self, expected: Expectation, parcel: Parcel) -> None:
        engine, rank = self._exchange.plan.receivers.places[parcel.receiver]
        if engine == 0:
            for name in parcel.tensors:
                if expected.wants(name, rank):
                    expected.add(name, parcel.reported(name), rank)

    def _payloads(self, handed: list[Mapping[int, str]]) -> list[list[str]]:
        """[engine][rank]: what each is handed, an empty list where it needs nothing of the bucket."""
        by_receiver = {index: payload for part in handed for index, payload in part.items()}
        nothing = payload_of({})
        payloads: list[list[str]] = [[] for _ in self._exchange.plan.receivers.engines]
        for index, (engine, _) in enumerate(self._exchange.plan.receivers.places):
            payloads[engine].append(by_receiver.get(index, nothing))
        return payloads


def payload_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Handles of tensors as SGLang's `/update_weights_from_tensor` takes them from one rank."""
    return base64.b64encode(bytes(ForkingPickler.dumps(list(tensors.items())))).decode("ascii")
