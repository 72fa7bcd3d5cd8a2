"""A checkpoint written by all trainer ranks at once: each gathers, hashes and writes its own share of whole tensors.

What a rank does not hold whole comes in turns (`gathering`). On a CPU each tensor is written as soon as it is hashed,
straight from the memory that it is trained in and while the caches still have it. What has to be copied first, from a
GPU or for a snapshot, a thread writes while the next turn is brought together; file writes let other threads run.

Nothing that looks finished stands at the checkpoint's path before all files are whole: they are written beside it. A
writer that fails goes on taking part in the turns, so that all ranks hear of it at the end, together.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.config.checkpoint_files import TOKENIZER_FILES
from r1mega.models.param_map import Slot
from r1mega.models.safetensors_file import Stored, preallocate, write_bytes
from r1mega.parallel.collectives import gather, share
from r1mega.weights.gathering import Gathering, Room, Shards, Wholes, aligned
from r1mega.weights.proof import Expectation
from r1mega.weights.served import as_reported, served
from r1mega.weights.spread_plan import entries_of
from r1mega.weights.write_plan import WeightFile, WritePlan

_WRITE_BYTES = 1 << 19  # at once, into a file that has room set aside
_CONFIGS = ("config.json", "generation_config.json")


class WriteError(RuntimeError):
    """A checkpoint could not be written: of every rank that failed the path, the bytes that it needs, the remedy."""


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

    def now(self, job: Callable[[], None]) -> None:
        """Do a job here, beside what the thread is at, unless one failed."""
        if self._fault is None:
            self._try(job)

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
            self._try(job)

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self._fault = str(error)


@dataclass
class _Half:
    """What one of two turns works with while the other's tensors are written."""

    staged: Room
    written: threading.Event | None = None


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
        self._gathering = Gathering(plan, rank, device)
        on_gpu = device.type == "cuda"
        self._halves = [_Half(Room(torch.device("cpu"), pinned=on_gpu)) for _ in range(2)]
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
        if not self._copies:
            self._hand.mark().wait()  # an old version that is still to be removed is gone by then
        write = self._hand.do if self._copies else self._hand.now
        held = self._gathering.held(shards)
        if self._whole is not None:
            self._whole.begin(sum(aligned(stored.nbytes) for stored in self._places.values()))
        for turn in range(len(self.plan.turns)):
            half = self._halves[turn % 2]
            if half.written is not None and self._whole is None:
                half.written.wait()
            wholes = self._gathering.exchange(turn, held)
            try:
                for name, tensor in self._tensors(wholes, half, expected):
                    place = self._places[name]
                    write(partial(self.put, self._part / place.file, place, tensor))
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

    def _tensors(self, wholes: Wholes, half: _Half, expected: Expectation | None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on the host) of all that this rank writes in a turn."""
        if self._copies and self._whole is None:
            names = [name for number in wholes for name in self._names(self.plan.slots[number])]
            half.staged.begin(sum(aligned(self._places[name].nbytes) for name in names))
        for number, values in wholes.items():
            slot = self.plan.slots[number]
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

    def _on_host(self, tensor: torch.Tensor, half: _Half) -> torch.Tensor:
        if not self._copies:
            return tensor.contiguous()
        room = half.staged if self._whole is None else self._whole
        return room.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)


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
