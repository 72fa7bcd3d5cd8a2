"""Brings each tensor together, whole, on the trainer rank that owns it by a plan (`spread_plan`), turn by turn.

A tensor that the owner holds whole is not copied: it stays where it is trained. The others come as rectangles
(`slices`), large ones straight from the memory that they are trained in to their place in the tensor where that is in
one piece, small ones packed into one message. The tensors stand in one half of a room that is kept, while what was made
of the turn before is still used from the other half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist

from r1mega.models.param_map import Op, Slot
from r1mega.weights.served import DTYPES, wire_dtype
from r1mega.weights.slices import Slice, slices_of
from r1mega.weights.spread_plan import Job, SpreadPlan

_ALIGNMENT = 16  # bytes: any dtype may begin there
_ALONE_BYTES = 1 << 16  # of a piece that is a message of its own (ours): a message costs as much as copying these
Shards = Iterable[tuple[Slot, int, torch.Tensor]]
Held = Mapping[tuple[str, int], torch.Tensor]  # by slot and shard
Wholes = dict[int, list[torch.Tensor]]  # by a slot's number in the plan; in the order of its tensors


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
class _Piece:
    """A rectangle of a slot's tensor, in one piece in a shard."""

    number: int
    slot: Slot
    shard: int
    at: Slice

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it lies in its tensor."""
        return tuple(slice(at, at + size) for at, size in zip(self.at.offset, self.at.shape, strict=True))

    @property
    def is_run(self) -> bool:
        """Whether it is in one piece in its tensor too."""
        return self.at.shape[1:] == self.slot.tensors[self.at.tensor].shape[1:]


_Message = tuple[_Piece, ...]


@dataclass(frozen=True)
class _Turn:
    """This rank's part in a turn: of each other rank what goes there, or comes from there; and what is here already."""

    sends: Mapping[int, list[_Message]] = field(default_factory=dict)
    receives: Mapping[int, list[_Message]] = field(default_factory=dict)
    own: tuple[_Piece, ...] = ()


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

    def exchange(self, turn: int, held: Held) -> Wholes:
        """Of each slot that this rank owns in a turn its tensors, whole, in the dtype of training or of the wire.

        Collective. They are good until the turn after the next, which takes the same half.
        """
        part, room = self._parts[turn], self._rooms[turn % 2]
        jobs = self.plan.turns[turn].get(self.rank, ())
        room.begin(sum(self._room_for(job) for job in jobs) + self._staged(part))
        wholes = {job.number: self._begin(job, held, room) for job in jobs}
        operations: list[dist.P2POp] = []
        landed: list[tuple[_Message, torch.Tensor]] = []
        for other, messages in part.sends.items():
            operations += [dist.P2POp(dist.isend, self._outgoing(message, held, room), other) for message in messages]
        for other, messages in part.receives.items():
            for message in messages:
                if self._lands(message):
                    (piece,) = message
                    space = wholes[piece.number][piece.at.tensor][piece.place].view(-1).view(torch.uint8)
                else:
                    space = room.take((self._nbytes(message),), torch.uint8)
                    landed.append((message, space))
                operations.append(dist.P2POp(dist.irecv, space, other))
        works = dist.batch_isend_irecv(operations) if operations else []
        for piece in part.own:
            wholes[piece.number][piece.at.tensor][piece.place].copy_(_rows(piece, held))
        for work in works:
            work.wait()
        for message, space in landed:
            for piece, packed in zip(message, self._split(message, space), strict=True):
                wholes[piece.number][piece.at.tensor][piece.place].copy_(packed)
        return wholes

    def _part_of(self, turn: int) -> _Turn:
        sends: dict[int, list[_Piece]] = {}
        receives: dict[int, list[_Piece]] = {}
        own: list[_Piece] = []
        for owner, jobs in self.plan.turns[turn].items():
            for job in jobs:
                slot = self.plan.slots[job.number]
                for shard, source in enumerate(job.sources):
                    if self.rank not in (owner, source):
                        continue
                    if owner == source and self._is_whole(slot, len(job.sources)):
                        continue  # a view of the shard
                    pieces = [
                        _Piece(job.number, slot, shard, piece)
                        for piece in _slices_of(slot.op, _shapes(slot), shard, len(job.sources))
                    ]
                    if owner == source:
                        own += pieces
                    elif source == self.rank:
                        sends.setdefault(owner, []).extend(pieces)
                    else:
                        receives.setdefault(source, []).extend(pieces)
        return _Turn(
            {other: list(self._messages(pieces)) for other, pieces in sends.items()},
            {other: list(self._messages(pieces)) for other, pieces in receives.items()},
            tuple(own),
        )

    def _messages(self, pieces: list[_Piece]) -> Iterator[_Message]:
        """The same on both sides: large ones alone, then all small ones together."""
        small = []
        for piece in pieces:
            if self._nbytes((piece,)) >= _ALONE_BYTES:
                yield (piece,)
            else:
                small.append(piece)
        if small:
            yield tuple(small)

    def _begin(self, job: Job, held: Held, room: Room) -> list[torch.Tensor]:
        """The tensors of a slot: views of the shard where each stands in one piece in it, else still of any values."""
        slot = self.plan.slots[job.number]
        if job.sources == (self.rank,) and self._is_whole(slot, 1):
            shard = held[slot.name, 0]
            return [shard[at.row : at.row + at.shape[0]] for at in _slices_of(slot.op, _shapes(slot), 0, 1)]
        return [room.take(tensor.shape, self._wire(slot)) for tensor in slot.tensors]

    def _room_for(self, job: Job) -> int:
        """Bytes of a slot's tensors, where they are not views."""
        slot = self.plan.slots[job.number]
        if job.sources == (self.rank,) and self._is_whole(slot, 1):
            return 0
        return sum(aligned(math.prod(tensor.shape) * self._wire(slot).itemsize) for tensor in slot.tensors)

    def _staged(self, part: _Turn) -> int:
        """Bytes of the messages that are packed, or have to be taken apart."""
        packed = [message for row in part.sends.values() for message in row if not self._leaves(message)]
        packed += [message for row in part.receives.values() for message in row if not self._lands(message)]
        return sum(aligned(self._nbytes(message)) for message in packed)

    def _leaves(self, message: _Message) -> bool:
        """Whether it leaves from the memory that it is trained in."""
        return len(message) == 1 and self._held(message[0].slot) == self._wire(message[0].slot)

    @staticmethod
    def _lands(message: _Message) -> bool:
        """Whether it comes to its place."""
        return len(message) == 1 and message[0].is_run

    def _outgoing(self, message: _Message, held: Held, room: Room) -> torch.Tensor:
        if self._leaves(message):
            return _rows(message[0], held).contiguous().view(-1).view(torch.uint8)
        space = room.take((self._nbytes(message),), torch.uint8)
        for piece, packed in zip(message, self._split(message, space), strict=True):
            packed.copy_(_rows(piece, held))
        return space

    def _split(self, message: _Message, space: torch.Tensor) -> Iterator[torch.Tensor]:
        """A message's pieces, in their shapes."""
        at = 0
        for piece in message:
            dtype = self._wire(piece.slot)
            nbytes = math.prod(piece.at.shape) * dtype.itemsize
            yield space[at : at + nbytes].view(dtype).view(piece.at.shape)
            at += aligned(nbytes)

    def _nbytes(self, message: _Message) -> int:
        sizes = [math.prod(piece.at.shape) * self._wire(piece.slot).itemsize for piece in message]
        return sizes[0] if len(sizes) == 1 else sum(map(aligned, sizes))

    def _is_whole(self, slot: Slot, num_shards: int) -> bool:
        """Whether each tensor of the slot stands in one piece in its one shard."""
        shapes = _shapes(slot)
        return num_shards == 1 and tuple(piece.shape for piece in _slices_of(slot.op, shapes, 0, 1)) == shapes

    def _held(self, slot: Slot) -> torch.dtype:
        return torch.float32 if slot.fp32 else DTYPES[self.plan.held]

    def _wire(self, slot: Slot) -> torch.dtype:
        return DTYPES[wire_dtype(slot, self.plan.serves, self.plan.held)]

    def _shard_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of each shard of a slot."""
        return _shape_of(slot.op, _shapes(slot), self.plan.placement.num_shards(slot))


def _shapes(slot: Slot) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.shape for tensor in slot.tensors)


def _rows(piece: _Piece, held: Held) -> torch.Tensor:
    """A piece in its shard."""
    rows = held[piece.slot.name, piece.shard][piece.at.row : piece.at.row + piece.at.shape[0]]
    return rows.view(piece.at.shape)


# The experts of a model are alike.
@lru_cache(maxsize=4096)
def _slices_of(op: Op, shapes: tuple[tuple[int, ...], ...], shard: int, num_shards: int) -> tuple[Slice, ...]:
    return tuple(slices_of(op, shapes, shard, num_shards))


@lru_cache(maxsize=4096)
def _shape_of(op: Op, shapes: tuple[tuple[int, ...], ...], num_shards: int) -> tuple[int, ...]:
    metas = [torch.empty(shape, device="meta") for shape in shapes]
    return tuple(op.to_megatron(metas, 0, num_shards).shape)
