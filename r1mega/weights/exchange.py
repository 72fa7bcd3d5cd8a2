"""Carries out a publish plan among the trainer's ranks: slices go to the rank beside each engine rank, whole tensors
come of them.

For engines that serve FP8 the courier makes the blocks, of the whole tensors: a cut of the trainer's layout may run
through a block, whose scale no rank could know alone. So the plan is of the trainer's dtype, links carry that, and what
is handed over is half of BF16. Couriers of several engine ranks quantise what all of these need, each for its own.

Bucket by bucket, every rank cuts what it sends out of its own shards, in the dtype of the engines, one message for each
engine rank. The **courier** of engine rank i, trainer rank i modulo the trainer's ranks, puts the rectangles together.
So a rank holds its shards, and of one bucket what it sends and what its engine ranks get.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from r1mega.models.fp8_blocks import SCALE_SUFFIX
from r1mega.models.param_map import Slot
from r1mega.weights.gathering import aligned
from r1mega.weights.plan import Delivery, Message, PublishPlan, Transfer
from r1mega.weights.served import DTYPES, as_reported, served


@dataclass(frozen=True)
class Parcel:
    """The tensors of one bucket for one engine rank, views of one buffer."""

    receiver: int
    tensors: dict[str, torch.Tensor]
    buffer: torch.Tensor

    def reported(self, name: str) -> torch.Tensor:
        """A tensor as the engine's checksum sees it."""
        scale = self.tensors.get(name + SCALE_SUFFIX)
        given = [(name, self.tensors[name])]
        return as_reported(given if scale is None else [*given, (name + SCALE_SUFFIX, scale)])


class Exchange:
    """One rank's part in every publish of a plan.

    Args:
        rank, world_size: of the trainer.
        in_shared_memory: whether buffers on the CPU are such that another process can be handed them.
        serves_fp8: whether the engines are given FP8 blocks of what the plan moves, and the rest in bf16.

    Raises:
        ValueError: the plan moves FP8 blocks, which are made here of whole tensors.
    """

    def __init__(
        self,
        plan: PublishPlan,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        in_shared_memory: bool = False,
        serves_fp8: bool = False,
    ) -> None:
        if plan.dtype not in DTYPES:
            raise ValueError(f"publish dtype: got {plan.dtype}; must be one of {', '.join(DTYPES)}; choose one of them")
        self.plan, self._rank, self._device, self._shared = plan, rank, device, in_shared_memory
        self._serves_fp8 = serves_fp8
        self._origins = {tensor.name: (slot, tensor) for slot in plan.slots for tensor in slot.tensors}
        places = plan.receivers.places
        self._world_size = world_size
        self.mine = list(range(rank, len(places), world_size))
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
        self._blocks: dict[int, torch.Tensor] = {}

    def buckets(self, shards: Iterable[tuple[Slot, int, torch.Tensor]]) -> Iterator[list[Parcel]]:
        """Of each bucket the parcels for this rank's engine ranks. Collective: every rank walks to the end.

        `shards` are the rank's own, as `ShardedModel.local` has them. A parcel is good until the next is asked for.
        """
        held = {(slot.name, shard): parameter.detach() for slot, shard, parameter in shards}
        for bucket in self.plan.buckets:
            yield self._exchange(bucket.index, held)

    def _exchange(self, bucket: int, held: Mapping[tuple[str, int], torch.Tensor]) -> list[Parcel]:
        operations: list[dist.P2POp] = []
        own: list[tuple[int, Message]] = []
        sends, receives = self._sends.get(bucket, []), self._receives.get(bucket, [])
        couriers = [self.plan.receivers.index(message.engine, message.rank) % self._world_size for message in sends]
        away = [(message, to) for message, to in zip(sends, couriers, strict=True) if to != self._rank]
        outgoing = self._space("outgoing", [message.nbytes for message, _ in away])
        for (message, courier), space in zip(away, outgoing, strict=True):
            operations.append(dist.P2POp(dist.isend, _pack(message, space, held), courier))
        arriving: list[tuple[int, Message, torch.Tensor]] = []
        # By sender and then receiver, as each sender goes through them.
        receives = sorted(receives, key=lambda pair: (pair[1].sender, pair[0]))
        incoming = iter(self._space("incoming", [m.nbytes for _, m in receives if m.sender != self._rank]))
        for index, message in receives:
            if message.sender == self._rank:
                own.append((index, message))
                continue
            packed = next(incoming)[: message.nbytes]
            operations.append(dist.P2POp(dist.irecv, packed, message.sender))
            arriving.append((index, message, packed))
        assert len(own) + len(away) == len(sends), "a message to this rank that nobody here asked for"
        works = dist.batch_isend_irecv(operations) if operations else []
        parcels = {index: self._empty(index, bucket) for index in self.mine if (index, bucket) in self._deliveries}
        for index, message in own:
            _place(message, held, parcels[index].tensors)
        for work in works:
            work.wait()
        for index, message, packed in arriving:
            _unpack(message, packed, parcels[index].tensors)
        if self._serves_fp8:
            parcels = {index: self._quantised(parcel) for index, parcel in parcels.items()}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another process reads what these copies write
        return list(parcels.values())

    def _space(self, name: str, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Bytes for messages of these sizes, each as aligned as its buffer."""
        padded = [aligned(size) for size in sizes]
        buffer = self._packed.get(name)
        if buffer is None or buffer.numel() < sum(padded):
            buffer = self._packed[name] = torch.empty(sum(padded), dtype=torch.uint8, device=self._device)
        return list(buffer[: sum(padded)].split(padded)) if padded else []

    def _empty(self, receiver: int, bucket: int) -> Parcel:
        """The tensors of a parcel, their values still to come."""
        deliveries = self._deliveries[receiver, bucket]
        sizes = [torch.Size(delivery.shape).numel() * DTYPES[delivery.dtype].itemsize for delivery in deliveries]
        buffer = self._buffer(self._parcels, receiver, sizes, handed=not self._serves_fp8)
        tensors = {
            delivery.name: space.view(DTYPES[delivery.dtype]).view(delivery.shape)
            for delivery, space in zip(deliveries, self._spaces(buffer, sizes), strict=True)
        }
        return Parcel(receiver, tensors, buffer)

    def _quantised(self, parcel: Parcel) -> Parcel:
        """The same tensors in FP8 blocks, with their scales."""
        given = {
            name: one
            for whole, value in parcel.tensors.items()
            for name, one in served(*self._origins[whole], value, "fp8")
        }
        sizes = [tensor.nbytes for tensor in given.values()]
        buffer = self._buffer(self._blocks, parcel.receiver, sizes, handed=True)
        tensors = {
            name: space.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for (name, tensor), space in zip(given.items(), self._spaces(buffer, sizes), strict=True)
        }
        return Parcel(parcel.receiver, tensors, buffer)

    def _buffer(
        self, kept: dict[int, torch.Tensor], receiver: int, sizes: Sequence[int], *, handed: bool
    ) -> torch.Tensor:
        """Bytes for tensors of these sizes; such that another process can open them where they are `handed` over."""
        total = sum(map(aligned, sizes))
        if receiver not in kept or kept[receiver].numel() < total:
            kept[receiver] = torch.empty(total, dtype=torch.uint8, device=self._device)
            if handed and self._shared and self._device.type == "cpu":
                kept[receiver].share_memory_()
        return kept[receiver][:total]

    @staticmethod
    def _spaces(buffer: torch.Tensor, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """The bytes of each, one after the other, as aligned as their buffer."""
        at = 0
        for size in sizes:
            yield buffer[at : at + size]
            at += aligned(size)


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


def _place(message: Message, held: Mapping[tuple[str, int], torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the rectangles of a message to this rank itself where they belong."""
    for transfer in message.transfers:
        rows = held[transfer.slot.name, transfer.shard][transfer.row : transfer.row + transfer.shape[0]]
        tensors[transfer.tensor.name][_within(transfer)] = rows.view(transfer.shape)


def _within(transfer: Transfer) -> tuple[slice, ...]:
    """Where a rectangle lies in its tensor."""
    return tuple(slice(at, at + size) for at, size in zip(transfer.offset, transfer.shape, strict=True))


def _unpack(message: Message, packed: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the rectangles of a message where they belong."""
    at = 0
    for transfer in message.transfers:
        dtype = DTYPES[transfer.dtype]
        part = packed[at : at + transfer.nbytes]
        at += transfer.nbytes
        # A place in the bytes may not be aligned to the dtype.
        part = part if (part.storage_offset() % dtype.itemsize) == 0 else part.clone()
        tensors[transfer.tensor.name][_within(transfer)] = part.view(dtype).view(transfer.shape)
    assert at == packed.numel(), "a message of another length"
