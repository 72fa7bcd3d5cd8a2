"""Publish over process groups that trainer ranks share with engine ranks: gloo on CPU, NCCL on CUDA.

For engines on other processors and nodes. SGLang 0.5.21 takes weights so by broadcast alone, from rank 0 of a group to
all ranks of an engine, and its scheduler carries out one call at a time. So every engine rank receives every tensor
whole, also the experts that it does not own, which its loader drops; and several senders could only take turns.

Each pipeline stage has one **sender**, its lowest rank, and a group of it and all ranks of all engines: no tensor
crosses the stages of the trainer. Bucket by bucket (`plan`), the sender collects whole tensors of its stage
(`exchange`) and broadcasts them in one piece, SGLang's `flattened_bucket`, while rank 0 tells the servers what comes.
Meanwhile the sender hashes what it sends and, over gloo, the next bucket is collected, in a second buffer.

**Faults.** A server that fails, or whose ranks vanish, ends its call to rank 0; every rank hears of it before the next
bucket. Then all leave the groups, and new ones are made at the next attempt. They are also made anew where a server
does not serve what was published last, because it was started again.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.parallel.collectives import gather, share
from r1mega.parallel.layout import Layout
from r1mega.parallel.outside import OutsideGroup, address_towards
from r1mega.types import GroupAddress, Servers, TrainerWeights
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.exchange import DTYPES, Exchange, Parcel, dense
from r1mega.weights.plan import PublishPlan
from r1mega.weights.proof import Expectation, PublishProof, publish_twice, speaker

GLOO_SECONDS = 120.0  # of one broadcast (ours): 1 GiB at 9 MB/s


def sender_of(plan: PublishPlan, bucket: int) -> int:
    """The trainer rank that broadcasts a bucket: the lowest of the bucket's stage."""
    return plan.buckets[bucket].stage * plan.trainer.per_stage


def exchange_for(
    fields: HfFields, trainer: Layout, rank: int, device: torch.device, *, dtype: str, bucket_bytes: int
) -> Exchange:
    """What a GroupPublisher collects whole tensors with, whatever the engines are."""
    plan = PublishPlan(
        fields, trainer, [EngineLayout()], dtype=dtype, bucket_bytes=bucket_bytes, with_mtp=False, is_spread=False
    )
    return Exchange(
        plan,
        rank,
        trainer.world_size,
        device,
        courier_of=lambda _, bucket: sender_of(plan, bucket),
        is_dense=True,
        num_kept=2,
    )


class GroupPublisher:
    """Broadcasts weights to servers.

    Args:
        exchange: from `exchange_for`.
        servers: on the rank that speaks to them, rank 0 of the group; None on the others.
        proof: what the servers have to report, on every rank.
        group: all ranks, for objects.
        num_ranks: of each server.
        backend: "gloo" or "nccl".
        seconds: that a call to a server, or the meeting of a group, may take.

    Raises:
        ValueError: the servers hold parameters of tensors that the plan does not send.
    """

    def __init__(
        self,
        exchange: Exchange,
        servers: Servers | None,
        proof: PublishProof,
        group: dist.ProcessGroup,
        *,
        num_ranks: Sequence[int],
        backend: str,
        seconds: float,
    ) -> None:
        self._exchange, self._servers, self._proof, self._group = exchange, servers, proof, group
        self._speak = speaker(servers, group)
        self._num_ranks, self._backend, self._seconds = list(num_ranks), backend, seconds
        plan = exchange.plan
        self._senders = sorted({sender_of(plan, bucket.index) for bucket in plan.buckets})
        found = {bucket: dense(deliveries) for bucket, deliveries in plan.delivered_to(0, 0)}
        rank = dist.get_rank(group)
        self._mine = {d.name for bucket, part in found.items() if sender_of(plan, bucket) == rank for d in part}
        absent = sorted(proof.tensors - {delivery.name for part in found.values() for delivery in part})
        if absent:
            raise ValueError(f"publish: the servers hold parameters of {', '.join(absent[:4])}, which are not sent")
        self._announced = {
            bucket: [(d.name, str(DTYPES[d.dtype]).removeprefix("torch."), d.shape) for d in part]
            for bucket, part in found.items()
        }
        self._outside: OutsideGroup | None = None  # of a sender
        self._names: list[str] = []  # of the groups, by sender; none while there are no groups
        self._published: int | None = None
        self._aside = ThreadPoolExecutor(2)  # speaks to the servers, and hashes, while tensors move
        self._call: Future[None] | None = None
        self._hashed: Future[None] | None = None

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where it fails a second time.
        """
        publish_twice(lambda: self._once(weights, version), version, speaks=self._servers is not None)

    def _once(self, weights: TrainerWeights, version: int) -> list[str]:
        """What went wrong, the same on every rank."""
        expected = self._proof.expect(version, tensors=self._mine)
        faults = self._speak(lambda servers: servers.begin_update()) or self._meet() or self._send(weights, expected)
        if faults:
            self._part()
            return faults
        faults = self._speak(lambda servers: servers.end_update(version))
        self._published = None if faults else version
        if faults or not self._proof.share:
            return faults
        digests: dict[int, dict[str, str]] = {}
        for part in gather(expected.results(), self._group):
            for rank, found in part.items():
                digests.setdefault(rank, {}).update(found)
        return self._speak(lambda servers: self._proof.faults(digests, servers.checksums()))

    def _send(self, weights: TrainerWeights, expected: Expectation) -> list[str]:
        """Every bucket: collected while the one before is under way."""
        for bucket, parcels in enumerate(self._exchange.buckets(weights.shards())):
            faults = self._finish()
            if faults:
                return faults
            self._start(bucket, parcels, expected)
            if self._backend == "nccl":
                # A broadcast that hangs would hold up what comes after it on the device, and nobody could end it.
                faults = self._finish()
                if faults:
                    return faults
        return self._finish()

    def _start(self, bucket: int, parcels: Sequence[Parcel], expected: Expectation) -> None:
        if self._servers is not None:
            name = self._names[self._senders.index(sender_of(self._exchange.plan, bucket))]
            self._call = self._aside.submit(self._servers.update_from_group, name, self._announced[bucket])
        for parcel in parcels:  # one, of the sender
            assert self._outside is not None
            self._outside.send(parcel.buffer)
            self._hashed = self._aside.submit(_hash, expected, parcel)

    def _finish(self) -> list[str]:
        """Wait until the servers have what was sent last."""
        call, self._call = self._call, None
        faults = self._speak(lambda _: call.result() if call else None)
        if self._outside is not None and faults:
            self._outside.close()  # the broadcast may hang, and keep the other servers waiting
        elif self._outside is not None:
            self._outside.wait()
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None
        return faults

    def _meet(self) -> list[str]:
        """Make the groups, where there are none that every server is still in. Collective."""
        if self._names and not self._speak(self._restarted):
            return []
        self._part()
        rank, size = dist.get_rank(self._group), 1 + sum(self._num_ranks)
        url, run = share((self._servers.urls[0], uuid.uuid4().hex[:8]) if self._servers else None, self._group)
        names = [f"r1mega-{run}-{sender}" for sender in self._senders]
        own = None
        if rank in self._senders:
            name = names[self._senders.index(rank)]
            # NCCL's own limit ends the process: the call to the server has to fail before.
            step = 2 * self._seconds if self._backend == "nccl" else min(GLOO_SECONDS, self._seconds)
            self._outside = OutsideGroup(name, size, self._backend, seconds=self._seconds, step_seconds=step)
            own = (address_towards(urlsplit(url).hostname), self._outside.port)
        hosts = gather(own, self._group)
        self._names = names
        first = [1 + sum(self._num_ranks[:i]) for i in range(len(self._num_ranks))]
        for sender, name in zip(self._senders, names, strict=True):
            address = GroupAddress(name, *hosts[sender], size, self._backend)
            call = self._aside.submit(self._servers.join_group, address, first) if self._servers is not None else None
            late = self._wait_for_others() if rank == sender else []
            told = self._speak(lambda _, call=call: call.result() if call else None)
            faults = told + [fault for part in gather(late, self._group) for fault in part]
            if faults:
                return faults
        return []

    def _wait_for_others(self) -> list[str]:
        assert self._outside is not None
        try:
            self._outside.meet()
        except RuntimeError as error:
            return [f"group {self._outside.name}: {error}"]
        return []

    def _restarted(self, servers: Servers) -> list[str]:
        found = zip(servers.urls, servers.weight_versions(), strict=True)
        return [f"{url} serves weights {version}" for url, version in found if version != str(self._published)]

    def _part(self) -> None:
        """Leave the groups. A server that cannot be told is no hindrance: no name is used again."""
        self._published = None
        if self._outside is not None:
            self._outside.close()
            self._outside = None
        names, self._names = self._names, []
        if self._servers is not None and names:
            self._servers.leave_groups(names)


def _hash(expected: Expectation, parcel: Parcel) -> None:
    for name, tensor in parcel.tensors.items():
        expected.add(name, tensor)
