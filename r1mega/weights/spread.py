"""A checkpoint written by all trainer ranks at once: each gathers, hashes and writes its own share of whole tensors.

A rank writes what it holds whole straight from its memory. The rest comes in turns (`write_plan`): in each, the ranks
send each other the shards that the writers want, and the writers put tensors together in one half of a room that is
kept, while a thread writes those of the turn before from the other half; file writes let other threads run.

Nothing that looks finished stands at the checkpoint's path before all files are whole: they are written beside it. A
writer that fails goes on taking part in the turns, so that all ranks hear of it at the end, together.
"""

from __future__ import annotations

import json
import math
import queue
import shutil
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.config.checkpoint_files import TOKENIZER_FILES
from r1mega.models.param_map import Op, Slot
from r1mega.models.safetensors_file import Stored, preallocate, write_bytes
from r1mega.parallel.collectives import gather, share
from r1mega.weights.proof import Expectation
from r1mega.weights.served import DTYPES, as_reported, served, wire_dtype
from r1mega.weights.slices import slices_of
from r1mega.weights.write_plan import WeightFile, WritePlan, entries_of

_ALIGNMENT = 16  # bytes: any dtype may begin there
_WRITE_BYTES = 1 << 22  # at once, into a file that has room set aside
_CONFIGS = ("config.json", "generation_config.json")
Shards = Iterable[tuple[Slot, int, torch.Tensor]]


class WriteError(RuntimeError):
    """A checkpoint could not be written: of every rank that failed the path, the bytes that it needs, the remedy."""


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


class Hand:
    """A thread that does jobs in turn. After one that failed it does no more of them; `mark`s are reached all the same.

    It ends with the process, whatever it is at.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], bool]] = queue.SimpleQueue()
        self._fault: str | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def do(self, job: Callable[[], None]) -> None:
        self._jobs.put((job, False))

    def mark(self) -> threading.Event:
        """Set when all that was asked for until now is done."""
        event = threading.Event()
        self._jobs.put((event.set, True))
        return event

    def finish(self) -> str | None:
        """Wait for all jobs; what went wrong since the last time, if anything."""
        self.mark().wait()
        fault, self._fault = self._fault, None
        return fault

    def _work(self) -> None:
        while True:
            job, always = self._jobs.get()
            if self._fault is not None and not always:
                continue
            try:
                job()
            except OSError as error:
                self._fault = str(error)


@dataclass
class _Half:
    """What one of two turns works with while the other's tensors are written."""

    gathered: Room
    staged: Room
    written: threading.Event | None = None


@dataclass(frozen=True)
class _Turn:
    """This rank's part in a turn: of each other rank the shards that go there, or come from there."""

    sends: Mapping[int, list[tuple[Slot, int]]] = field(default_factory=dict)
    receives: Mapping[int, list[tuple[Slot, int]]] = field(default_factory=dict)


class SpreadWriter:
    """One rank's part in every checkpoint of a plan.

    Args:
        model: directory of config.json and the tokenizer, which the checkpoint gets copies of.
        group: all ranks, for objects.
        snapshot: whether what is written is copied first, so that the parameters may change when `gather` is done. It
            takes as much host memory as this rank writes.
    """

    def __init__(
        self,
        plan: WritePlan,
        rank: int,
        device: torch.device,
        model: Path,
        group: dist.ProcessGroup,
        *,
        snapshot: bool = False,
    ) -> None:
        self.plan, self.rank, self.model, self._group = plan, rank, model, group
        self._files = [file for file in plan.files if file.writer == rank]
        self._places = {stored.name: stored for file in self._files for stored in file.stored}
        self._turns = [self._part_of(turn) for turn in range(len(plan.turns))]
        on_gpu = device.type == "cuda"
        self._halves = [_Half(Room(device), Room(torch.device("cpu"), pinned=on_gpu)) for _ in range(2)]
        self._copies = snapshot or on_gpu
        self._whole = Room(torch.device("cpu"), pinned=on_gpu) if snapshot else None
        self._hand = Hand()
        self._fault: str | None = None
        self._part = model  # of the checkpoint in the making

    def write(self, shards: Shards, path: Path, expected: Expectation | None = None) -> None:
        """Write a checkpoint at `path`. Collective; raises WriteError on every rank where one failed.

        `shards` are the rank's own, as `ShardedModel.local` has them. `expected` takes every tensor of the table that
        this rank writes.
        """
        self.gather(shards, path, expected)
        self.settle()
        if self.rank == 0:
            replaced = complete(path, self.plan, self.model)
            if replaced is not None:
                self.after(partial(shutil.rmtree, replaced))

    def gather(self, shards: Shards, path: Path, expected: Expectation | None = None) -> None:
        """Have everything on its way to the disk, beside `path`. Collective."""
        self._part = part_of(path)
        if self.rank == 0:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        share(None, self._group)
        self._hand.do(partial(_make_files, self._part, self._files))
        held = {(slot.name, shard): parameter.detach() for slot, shard, parameter in shards}
        self._check(held)
        if self._whole is not None:
            self._whole.begin(sum(aligned(stored.nbytes) for stored in self._places.values()))
        for turn, part in enumerate(self._turns):
            half = self._halves[turn % 2]
            if half.written is not None and self._whole is None:
                half.written.wait()
            parts = ChainMap(self._exchange(turn, part, half, held), held)
            try:
                for name, tensor in self._tensors(turn, half, parts, expected):
                    place = self._places[name]
                    self._hand.do(partial(self.put, self._part / place.file, place, tensor))
            except ValueError as error:  # the others are still in need of this rank
                self._fault = self._fault or str(error)
            half.written = self._hand.mark()

    def settle(self) -> None:
        """Wait until all that was gathered is in the files. Collective; raises WriteError where a rank failed."""
        fault = self._hand.finish()
        if fault is not None:
            nbytes = sum(file.nbytes for file in self._files)
            fault = (
                f"{self._part}: {fault}; rank {self.rank} writes {nbytes} bytes there, all ranks {self.plan.nbytes}; "
                "free room, or set sglang.weights_dir to a file system with more that all ranks and servers see"
            )
        faults = [found for found in gather(self._fault or fault, self._group) if found]
        self._fault = None
        if faults:
            raise WriteError("\n".join(dict.fromkeys(faults)))

    def after(self, job: Callable[[], None]) -> None:
        """Have a job done when this rank's files are written, beside whatever comes next."""
        self._hand.do(job)

    @staticmethod
    def put(path: Path, place: Stored, tensor: torch.Tensor) -> None:
        """Write one tensor where it belongs."""
        write_bytes(path, place.at, tensor, _WRITE_BYTES)

    def _check(self, held: Mapping[tuple[str, int], torch.Tensor]) -> None:
        """Raise ValueError for a shard that is none of the plan's: a server would end by its shape."""
        for slot in self.plan.slots:
            shard = self.plan.placement.shard_on(slot, self.rank)
            if shard is None:
                continue
            expected, found = _shard_shape(self.plan, slot), held.get((slot.name, shard))
            if found is None or tuple(found.shape) != expected:
                got = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise ValueError(f"publish: {slot.name} {got}; config.json makes a shard of it {list(expected)}")

    def _part_of(self, turn: int) -> _Turn:
        sends: dict[int, list[tuple[Slot, int]]] = {}
        receives: dict[int, list[tuple[Slot, int]]] = {}
        for writer, jobs in self.plan.turns[turn].items():
            for job in jobs:
                for shard, source in enumerate(job.sources):
                    if writer != self.rank and source == self.rank:
                        sends.setdefault(writer, []).append((self.plan.slots[job.number], shard))
                    elif writer == self.rank and source != self.rank:
                        receives.setdefault(source, []).append((self.plan.slots[job.number], shard))
        return _Turn(sends, receives)

    def _exchange(
        self, turn: int, part: _Turn, half: _Half, held: Mapping[tuple[str, int], torch.Tensor]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """The shards that this rank lacks of what it writes in a turn, in the dtype they move in."""
        pieces = [piece for row in (*part.sends.values(), *part.receives.values()) for piece in row]
        assembled = sum(
            aligned(math.prod(tensor.shape) * self._wire(slot).itemsize)
            for job in self.plan.turns[turn].get(self.rank, ())
            for slot in [self.plan.slots[job.number]]
            for tensor in slot.tensors
        )
        half.gathered.begin(assembled + sum(self._shard_bytes(slot) for slot, _ in pieces))
        operations: list[dist.P2POp] = []
        arriving: dict[tuple[str, int], torch.Tensor] = {}
        for other, row in part.sends.items():
            message = half.gathered.take((sum(self._shard_bytes(slot) for slot, _ in row),), torch.uint8)
            for (slot, shard), space in zip(row, self._split(message, row), strict=True):
                space.copy_(held[slot.name, shard])
            operations.append(dist.P2POp(dist.isend, message, other))
        for other, row in part.receives.items():
            message = half.gathered.take((sum(self._shard_bytes(slot) for slot, _ in row),), torch.uint8)
            for (slot, shard), space in zip(row, self._split(message, row), strict=True):
                arriving[slot.name, shard] = space
            operations.append(dist.P2POp(dist.irecv, message, other))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return arriving

    def _split(self, message: torch.Tensor, row: list[tuple[Slot, int]]) -> Iterator[torch.Tensor]:
        """A message's shards, in their shapes."""
        at = 0
        for slot, _ in row:
            dtype, shape = self._wire(slot), _shard_shape(self.plan, slot)
            nbytes = math.prod(shape) * dtype.itemsize
            yield message[at : at + nbytes].view(dtype).view(shape)
            at += aligned(nbytes)

    def _tensors(
        self, turn: int, half: _Half, parts: Mapping[tuple[str, int], torch.Tensor], expected: Expectation | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the host) of all that this rank writes in a turn."""
        jobs = self.plan.turns[turn].get(self.rank, ())
        if self._copies and self._whole is None:
            names = [name for job in jobs for name in self._names(self.plan.slots[job.number])]
            half.staged.begin(sum(aligned(self._places[name].nbytes) for name in names))
        for job in jobs:
            slot = self.plan.slots[job.number]
            shards = [parts[slot.name, shard] for shard in range(len(job.sources))]
            values = self._assemble(slot, shards, half)
            pairs = [*zip(slot.tensors, values, strict=True), *((alias, values[0]) for alias in slot.aliases)]
            for tensor, value in pairs:
                given = served(slot, tensor, value, self.plan.serves)
                if expected is not None and expected.wants(tensor.name):
                    expected.add(tensor.name, as_reported(given))
                for name, one in given:
                    yield name, self._on_host(one, half)

    def _names(self, slot: Slot) -> Iterator[str]:
        for tensor in (*slot.tensors, *slot.aliases):
            yield from (name for name, _, _ in entries_of(slot, tensor, self.plan.serves))

    def _assemble(self, slot: Slot, shards: list[torch.Tensor], half: _Half) -> list[torch.Tensor]:
        """The slot's whole tensors; views of the shard where there is one, and each tensor stands in one piece."""
        shapes = [tensor.shape for tensor in slot.tensors]
        cuts = [list(slices_of(slot.op, shapes, index, len(shards))) for index in range(len(shards))]
        if len(shards) == 1 and [piece.shape for piece in cuts[0]] == shapes:
            return [shards[0][piece.row : piece.row + piece.shape[0]] for piece in cuts[0]]
        values = [half.gathered.take(shape, self._wire(slot)) for shape in shapes]
        for shard, pieces in zip(shards, cuts, strict=True):
            for piece in pieces:
                place = tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))
                values[piece.tensor][place].copy_(shard[piece.row : piece.row + piece.shape[0]])
        return values

    def _on_host(self, tensor: torch.Tensor, half: _Half) -> torch.Tensor:
        if not self._copies:
            return tensor.contiguous()
        room = half.staged if self._whole is None else self._whole
        return room.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def _wire(self, slot: Slot) -> torch.dtype:
        return DTYPES[wire_dtype(slot, self.plan.serves, self.plan.held)]

    def _shard_bytes(self, slot: Slot) -> int:
        return aligned(math.prod(_shard_shape(self.plan, slot)) * self._wire(slot).itemsize)


def part_of(path: Path) -> Path:
    """Where the files of a checkpoint stand until they are whole."""
    return path.with_name(path.name + ".part")


def complete(path: Path, plan: WritePlan, model: Path) -> Path | None:
    """Add the index and the files beside the weights, and move the whole into place. Raises OSError.

    Returns where what stood there before was moved, if anything did: removing it takes as long as writing a part of it.
    """
    part, files = part_of(path), plan.files
    if len(files) > 1:
        weight_map = {stored.name: file.name for file in files for stored in file.stored}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    for name in (*_CONFIGS, *TOKENIZER_FILES):
        if (model / name).exists():
            shutil.copyfile(model / name, part / name)
    replaced = path.with_name(path.name + ".old") if path.exists() else None
    if replaced is not None:
        path.rename(replaced)
    part.rename(path)
    return replaced


def _make_files(folder: Path, files: list[WeightFile]) -> None:
    """Each file with its head, and room on the disk for the rest. Raises OSError, for a full disk before it is full."""
    folder.mkdir(parents=True, exist_ok=True)  # on another node it may not be seen yet
    for file in files:
        (folder / file.name).write_bytes(file.head)
        preallocate(folder / file.name, 0, file.nbytes)


@lru_cache(maxsize=4096)  # the experts of a model are alike
def _shape_of(op: Op, shapes: tuple[tuple[int, ...], ...], num_shards: int) -> tuple[int, ...]:
    metas = [torch.empty(shape, device="meta") for shape in shapes]
    return tuple(op.to_megatron(metas, 0, num_shards).shape)


def _shard_shape(plan: WritePlan, slot: Slot) -> tuple[int, ...]:
    """The shape of each shard of a slot."""
    return _shape_of(slot.op, tuple(tensor.shape for tensor in slot.tensors), plan.placement.num_shards(slot))
