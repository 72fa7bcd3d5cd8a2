"""Carries out a publish plan among the trainer's ranks: slices go to the rank beside each engine rank, whole tensors
come of them.

Bucket by bucket, every rank cuts what it sends out of its own shards, in the dtype of the engines, one message for each
engine rank. The **courier** of an engine rank, the trainer rank that can hand it memory, puts the rectangles together.
So a rank holds its shards, and of one bucket what it sends and what its engine ranks get.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from r1mega.models.param_map import Slot
from r1mega.weights.plan import Delivery, Message, PublishPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ALIGNMENT = 16  # bytes, of each tensor in its buffer: any dtype may begin there


@dataclass(frozen=True)
class Parcel:
    """The tensors of one bucket for one engine rank, views of one buffer."""

    receiver: int
    tensors: dict[str, torch.Tensor]
    buffer: torch.Tensor


class Exchange:
    """One rank's part in every publish of a plan.

    Args:
        rank, world_size: of the trainer. The courier of receiver i is rank i % world_size.
        in_shared_memory: whether buffers on the CPU are such that another process can be handed them.

    Raises:
        ValueError: the plan is for FP8 blocks, which are not cut here yet.
    """

    def __init__(
        self, plan: PublishPlan, rank: int, world_size: int, device: torch.device, *, in_shared_memory: bool = False
    ) -> None:
        if plan.dtype not in DTYPES:
            raise ValueError(f"publish dtype: got {plan.dtype}; must be one of {', '.join(DTYPES)}; choose one of them")
        self.plan, self._rank, self._device, self._shared = plan, rank, device, in_shared_memory
        places = plan.receivers.places
        self._world_size = world_size
        self.mine = [index for index in range(len(places)) if index % world_size == rank]
        self._sends = _by_bucket(plan.sends_of(rank))
        self._receives: dict[int, list[tuple[int, Message]]] = {}
        self._deliveries: dict[tuple[int, int], list[Delivery]] = {}
        for index in self.mine:
            for message in plan.receives_of(*places[index]):
                self._receives.setdefault(message.bucket, []).append((index, message))
            for bucket, found in plan.delivered_to(*places[index]):
                self._deliveries[index, bucket] = found
        # Kept from bucket to bucket and from publish to publish: new memory costs more than what is copied into it.
        self._parcels: dict[int, torch.Tensor] = {}
        self._packed: dict[str, torch.Tensor] = {}

    def buckets(self, shards: Iterable[tuple[Slot, int, torch.Tensor]]) -> Iterator[list[Parcel]]:
        """Of each bucket the parcels for this rank's engine ranks. Collective: every rank walks to the end.

        `shards` are the rank's own, as `ShardedModel.local` has them. A parcel is good until the next one is asked for.
        """
        held = {(slot.name, shard): parameter.detach() for slot, shard, parameter in shards}
        for bucket in self.plan.buckets:
            yield self._exchange(bucket.index, held)

    def _exchange(self, bucket: int, held: Mapping[tuple[str, int], torch.Tensor]) -> list[Parcel]:
        operations: list[dist.P2POp] = []
        own: list[tuple[Message, torch.Tensor]] = []
        sends, receives = self._sends.get(bucket, []), self._receives.get(bucket, [])
        outgoing = iter(self._space("outgoing", [message.nbytes for message in sends]))
        for message in sends:
            packed = _pack(message, next(outgoing), held)
            courier = self.plan.receivers.index(message.engine, message.rank) % self._world_size
            if courier == self._rank:
                own.append((message, packed))
            else:
                operations.append(dist.P2POp(dist.isend, packed, courier))
        arriving: list[tuple[int, Message, torch.Tensor]] = []
        # By sender and then receiver, as each sender goes through them.
        receives = sorted(receives, key=lambda pair: (pair[1].sender, pair[0]))
        incoming = iter(self._space("incoming", [m.nbytes for _, m in receives if m.sender != self._rank]))
        for index, message in receives:
            if message.sender == self._rank:
                arriving.append((index, message, own.pop(0)[1]))
                continue
            packed = next(incoming)[: message.nbytes]
            operations.append(dist.P2POp(dist.irecv, packed, message.sender))
            arriving.append((index, message, packed))
        assert not own, "a message to this rank that nobody here asked for"
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        parcels = {index: self._empty(index, bucket) for index in self.mine if (index, bucket) in self._deliveries}
        for index, message, packed in arriving:
            _unpack(message, packed, parcels[index].tensors)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another process reads what these copies write
        return list(parcels.values())

    def _space(self, name: str, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Bytes for messages of these sizes, each as aligned as its buffer."""
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        buffer = self._packed.get(name)
        if buffer is None or buffer.numel() < sum(padded):
            buffer = self._packed[name] = torch.empty(sum(padded), dtype=torch.uint8, device=self._device)
        return list(buffer[: sum(padded)].split(padded)) if padded else []

    def _empty(self, receiver: int, bucket: int) -> Parcel:
        """The tensors of a parcel, their values still to come."""
        deliveries = self._deliveries[receiver, bucket]
        places, total = [], 0
        for delivery in deliveries:
            size = torch.Size(delivery.shape).numel() * DTYPES[delivery.dtype].itemsize
            places.append((total, size))
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        buffer = self._parcels.get(receiver)
        if buffer is None or buffer.numel() < total:
            buffer = torch.empty(total, dtype=torch.uint8, device=self._device)
            if self._shared and self._device.type == "cpu":
                buffer.share_memory_()
            self._parcels[receiver] = buffer
        tensors = {
            delivery.name: buffer[at : at + size].view(DTYPES[delivery.dtype]).view(delivery.shape)
            for delivery, (at, size) in zip(deliveries, places, strict=True)
        }
        return Parcel(receiver, tensors, buffer)


def _by_bucket(messages: Iterator[Message]) -> dict[int, list[Message]]:
    return {bucket: list(found) for bucket, found in groupby(messages, key=lambda message: message.bucket)}


def _pack(message: Message, space: torch.Tensor, held: Mapping[tuple[str, int], torch.Tensor]) -> torch.Tensor:
    """The rectangles of a message one after the other: rows of shards, in the dtype of the engines."""
    at = 0
    for transfer in message.transfers:
        shard, dtype = held[transfer.slot.name, transfer.shard], DTYPES[transfer.dtype]
        rows = shard[transfer.row : transfer.row + transfer.shape[0]].to(dtype).contiguous()
        space[at : at + transfer.nbytes] = rows.view(-1).view(torch.uint8)
        at += transfer.nbytes
    return space[:at]


def _unpack(message: Message, packed: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the rectangles of a message where they belong."""
    at = 0
    for transfer in message.transfers:
        dtype = DTYPES[transfer.dtype]
        part = packed[at : at + transfer.nbytes]
        at += transfer.nbytes
        # A place in the bytes may not be aligned to the dtype.
        part = part if (part.storage_offset() % dtype.itemsize) == 0 else part.clone()
        place = tuple(slice(o, o + n) for o, n in zip(transfer.offset, transfer.shape, strict=True))
        tensors[transfer.tensor.name][place] = part.view(dtype).view(transfer.shape)
    assert at == packed.numel(), "a message of another length"
