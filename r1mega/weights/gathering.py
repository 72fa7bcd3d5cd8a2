"""Brings each tensor together, whole, on the trainer rank that owns it by a plan (`spread_plan`), turn by turn.

In each turn the ranks send each other the shards that the owners lack, and an owner puts its tensors together in one
half of a room that is kept, while what it made of the turn before is still used from the other half. A tensor that the
owner holds whole is not copied: it stays where it is trained.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist

from r1mega.models.param_map import HfTensor, Op, Slot
from r1mega.weights.served import DTYPES, wire_dtype
from r1mega.weights.slices import slices_of
from r1mega.weights.spread_plan import SpreadPlan

_ALIGNMENT = 16  # bytes: any dtype may begin there
Shards = Iterable[tuple[Slot, int, torch.Tensor]]
Held = Mapping[tuple[str, int], torch.Tensor]  # by slot and shard


class Room:
    """Memory that is kept from use to use: new memory costs more than what is copied into it."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device, self._pinned = device, pinned
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._at = 0

    def begin(self, nbytes: int) -> None:
        """Take back what was handed out; `nbytes` is what will be asked for, `aligned` sizes summed up."""
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        self._at = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values."""
        nbytes = math.prod(shape) * dtype.itemsize
        found = self._buffer[self._at : self._at + nbytes].view(dtype).view(shape)
        self._at += aligned(nbytes)
        return found


def aligned(nbytes: int) -> int:
    """Bytes that a room is asked for, for so many."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class _Turn:
    """This rank's part in a turn: of each other rank the shards that go there, or come from there."""

    sends: Mapping[int, list[tuple[Slot, int]]] = field(default_factory=dict)
    receives: Mapping[int, list[tuple[Slot, int]]] = field(default_factory=dict)


class Gathering:
    """One rank's part in every turn of a plan."""

    def __init__(self, plan: SpreadPlan, rank: int, device: torch.device) -> None:
        self.plan, self.rank = plan, rank
        self._parts = [self._part_of(turn) for turn in range(len(plan.turns))]
        self._rooms = [Room(device) for _ in range(2)]

    def held(self, shards: Shards) -> Held:
        """The rank's own shards, as `ShardedModel.local` has them.

        Raises ValueError for a shard that is none of the plan's: a server would end by its shape.
        """
        held = {(slot.name, shard): parameter.detach() for slot, shard, parameter in shards}
        for slot in self.plan.slots:
            shard = self.plan.placement.shard_on(slot, self.rank)
            if shard is None:
                continue
            expected, found = self._shard_shape(slot), held.get((slot.name, shard))
            if found is None or tuple(found.shape) != expected:
                got = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise ValueError(f"publish: {slot.name} {got}; config.json makes a shard of it {list(expected)}")
        return held

    def exchange(self, turn: int, held: Held) -> Held:
        """`held`, and the shards that this rank lacks of what it owns in a turn, in the dtype they move in. Collective.

        These, and what `tensors` makes of them, are good until the turn after the next: it takes the same half.
        """
        part, room = self._parts[turn], self._rooms[turn % 2]
        pieces = [piece for row in (*part.sends.values(), *part.receives.values()) for piece in row]
        room.begin(self._assembled(turn) + sum(self._shard_bytes(slot) for slot, _ in pieces))
        operations: list[dist.P2POp] = []
        arriving: dict[tuple[str, int], torch.Tensor] = {}
        for other, row in part.sends.items():
            message = room.take((sum(self._shard_bytes(slot) for slot, _ in row),), torch.uint8)
            for (slot, shard), space in zip(row, self._split(message, row), strict=True):
                space.copy_(held[slot.name, shard])
            operations.append(dist.P2POp(dist.isend, message, other))
        for other, row in part.receives.items():
            message = room.take((sum(self._shard_bytes(slot) for slot, _ in row),), torch.uint8)
            for (slot, shard), space in zip(row, self._split(message, row), strict=True):
                arriving[slot.name, shard] = space
            operations.append(dist.P2POp(dist.irecv, message, other))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return ChainMap(arriving, held)

    def tensors(self, turn: int, parts: Held) -> Iterator[tuple[Slot, list[tuple[HfTensor, torch.Tensor]]]]:
        """Of each slot that this rank owns in a turn its tensors, whole, in the dtype they move in or are trained in.

        `parts` are what `exchange` returned.
        """
        for job in self.plan.turns[turn].get(self.rank, ()):
            slot = self.plan.slots[job.number]
            values = self._assemble(slot, [parts[slot.name, shard] for shard in range(len(job.sources))], turn)
            yield slot, list(zip(slot.tensors, values, strict=True))

    def _part_of(self, turn: int) -> _Turn:
        sends: dict[int, list[tuple[Slot, int]]] = {}
        receives: dict[int, list[tuple[Slot, int]]] = {}
        for owner, jobs in self.plan.turns[turn].items():
            for job in jobs:
                for shard, source in enumerate(job.sources):
                    if owner != self.rank and source == self.rank:
                        sends.setdefault(owner, []).append((self.plan.slots[job.number], shard))
                    elif owner == self.rank and source != self.rank:
                        receives.setdefault(source, []).append((self.plan.slots[job.number], shard))
        return _Turn(sends, receives)

    def _assembled(self, turn: int) -> int:
        """Bytes of the tensors of a turn that are put together."""
        return sum(
            aligned(math.prod(tensor.shape) * self._wire(slot).itemsize)
            for job in self.plan.turns[turn].get(self.rank, ())
            for slot in [self.plan.slots[job.number]]
            if not self._is_whole(slot, len(job.sources))
            for tensor in slot.tensors
        )

    def _split(self, message: torch.Tensor, row: list[tuple[Slot, int]]) -> Iterator[torch.Tensor]:
        """A message's shards, in their shapes."""
        at = 0
        for slot, _ in row:
            dtype, shape = self._wire(slot), self._shard_shape(slot)
            nbytes = math.prod(shape) * dtype.itemsize
            yield message[at : at + nbytes].view(dtype).view(shape)
            at += aligned(nbytes)

    def _assemble(self, slot: Slot, shards: list[torch.Tensor], turn: int) -> list[torch.Tensor]:
        """The slot's whole tensors; views of the shard where there is one, and each tensor stands in one piece."""
        shapes = [tensor.shape for tensor in slot.tensors]
        cuts = [list(slices_of(slot.op, shapes, index, len(shards))) for index in range(len(shards))]
        if self._is_whole(slot, len(shards)):
            return [shards[0][piece.row : piece.row + piece.shape[0]] for piece in cuts[0]]
        values = [self._rooms[turn % 2].take(shape, self._wire(slot)) for shape in shapes]
        for shard, pieces in zip(shards, cuts, strict=True):
            for piece in pieces:
                place = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))
                values[piece.tensor][place].copy_(shard[piece.row : piece.row + piece.shape[0]])
        return values

    def _is_whole(self, slot: Slot, num_shards: int) -> bool:
        """Whether each tensor of the slot stands in one piece in its one shard."""
        shapes = [tensor.shape for tensor in slot.tensors]
        return num_shards == 1 and [piece.shape for piece in slices_of(slot.op, shapes, 0, 1)] == shapes

    def _wire(self, slot: Slot) -> torch.dtype:
        return DTYPES[wire_dtype(slot, self.plan.serves, self.plan.held)]

    def _shard_bytes(self, slot: Slot) -> int:
        return aligned(math.prod(self._shard_shape(slot)) * self._wire(slot).itemsize)

    def _shard_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of each shard of a slot."""
        return _shape_of(slot.op, tuple(tensor.shape for tensor in slot.tensors), self.plan.placement.num_shards(slot))


@lru_cache(maxsize=4096)  # the experts of a model are alike
def _shape_of(op: Op, shapes: tuple[tuple[int, ...], ...], num_shards: int) -> tuple[int, ...]:
    metas = [torch.empty(shape, device="meta") for shape in shapes]
    return tuple(op.to_megatron(metas, 0, num_shards).shape)
