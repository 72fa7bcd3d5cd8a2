"""Which trainer rank writes which tensors of a checkpoint, and when its parts reach it: integers alone.

**Writers.** Every rank may write. Parameters that have to pass through one rank (`together`: what an engine hashes as
one) make an atom; each goes to the least loaded of the ranks that hold most of it, the largest atoms first. Experts are
so written where they are, and what all ranks of a stage hold is spread over them.

**Turns.** Each writer goes through its parameters in the table's order, and a turn is what fits in `turn_bytes` for
everyone: for a writer what it writes, for a sender what it sends. So memory is bounded on both sides, and where several
writers want the same rank's experts first, they take turns.

**Files.** Each writer has its own, of `file_bytes` at most, whole tensors one after the other as the turns bring them.
Every rank knows all of them, so the index is written without asking anyone. A plan is the same wherever it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from r1mega.models import fp8_blocks
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor, Slot
from r1mega.models.safetensors_file import Stored, lay_out, nbytes_of
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout
from r1mega.weights.holders import Holders
from r1mega.weights.served import wire_dtype
from r1mega.weights.slices import ITEM_BYTES, dtype_of

TURN_BYTES = 1 << 28
FILE_BYTES = 4 << 30
_FORMAT = {"fp32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype by the format's name, shape


@dataclass(frozen=True, slots=True)
class Job:
    """One parameter to be written: `number` in the plan's slots, and of each shard the rank that hands it over."""

    number: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class WeightFile:
    """One file of the checkpoint: its head, and where its tensors stand."""

    name: str
    writer: int
    head: bytes
    stored: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        return self.stored[-1].at + self.stored[-1].nbytes


class WritePlan:
    """The plan of one checkpoint.

    Args:
        serves: the dtype of the files, "fp32", "bf16" or "fp8" (for FP8 blocks with their scales; the rest in bf16).
            What is always kept in fp32 stays so.
        held: the dtype that the trainer holds weights in, "fp32" or "bf16".
        together: names of tensors that have to pass through one rank, group by group.
        turn_bytes: that a rank gathers, and that it sends, in one turn; more only for one parameter.

    Raises:
        ValueError: all that is wrong with the layout.
    """

    def __init__(
        self,
        fields: HfFields,
        trainer: Layout,
        *,
        serves: str,
        held: str,
        together: Iterable[Sequence[str]] = (),
        turn_bytes: int = TURN_BYTES,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        found = trainer.problems(fields.shape())
        if found:
            raise ValueError("\n".join(found))
        self.trainer, self.serves, self.held = trainer, serves, held
        self.placement = placement_of(fields, trainer)
        self.slots = [slot for slot in slots_of(fields) if not slot.is_copy]
        self._turn_bytes, self._file_bytes = turn_bytes, file_bytes
        self._holders = Holders(self.placement, trainer)
        self._entries = [list(self._entries_of(slot)) for slot in self.slots]
        self._sizes = [sum(nbytes_of(kind, shape) for _, kind, shape in entries) for entries in self._entries]
        jobs = self._deal(self._atoms(together))
        self.turns: list[dict[int, tuple[Job, ...]]] = list(self._turns(jobs))

    @cached_property
    def files(self) -> tuple[WeightFile, ...]:
        """All files, in the order of their writers."""
        groups = list(self._groups())
        names = (
            ["model.safetensors"]
            if len(groups) == 1
            else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        )
        return tuple(
            WeightFile(name, writer, head, tuple(stored))
            for name, (writer, numbers) in zip(names, groups, strict=True)
            for head, stored in [lay_out([entry for number in numbers for entry in self._entries[number]], name)]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._sizes)

    def wire_bytes(self, slot: Slot) -> int:
        """Bytes of one shard of the slot as it is handed over, padding of the vocabulary left out."""
        item = ITEM_BYTES[wire_dtype(slot, self.serves, self.held)]
        return item * sum(math.prod(tensor.shape) for tensor in slot.tensors) // self.placement.num_shards(slot)

    def tensors_of(self, writer: int) -> set[str]:
        """Names of the table's tensors that pass through a writer, in plain numbers."""
        return {
            tensor.name
            for turn in self.turns
            for job in turn.get(writer, ())
            for tensor in (*self.slots[job.number].tensors, *self.slots[job.number].aliases)
        }

    def _entries_of(self, slot: Slot) -> Iterator[Entry]:
        for tensor in (*slot.tensors, *slot.aliases):
            yield from entries_of(slot, tensor, self.serves)

    def _atoms(self, together: Iterable[Sequence[str]]) -> list[list[int]]:
        """Numbers of slots that go to one writer, in the order of their first."""
        number_of = {tensor.name: number for number, slot in enumerate(self.slots) for tensor in slot.tensors}
        number_of |= {alias.name: number for number, slot in enumerate(self.slots) for alias in slot.aliases}
        parent = list(range(len(self.slots)))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        for names in together:
            first, *others = sorted({root(number_of[name]) for name in names})
            for other in others:
                parent[root(other)] = root(first)
        atoms: dict[int, list[int]] = {}
        for number in range(len(self.slots)):
            atoms.setdefault(root(number), []).append(number)
        return list(atoms.values())

    def _deal(self, atoms: Sequence[Sequence[int]]) -> list[list[Job]]:
        """The jobs of every rank, in the table's order."""
        loads = [0] * self.trainer.world_size
        jobs: list[list[Job]] = [[] for _ in loads]
        sizes = [sum(self._sizes[number] for number in atom) for atom in atoms]
        for index in sorted(range(len(atoms)), key=lambda index: (-sizes[index], index)):
            held: dict[int, int] = {}
            for number in atoms[index]:
                for shard in range(self.placement.num_shards(self.slots[number])):
                    for rank in self._holders.of(self.slots[number], shard):
                        held[rank] = held.get(rank, 0) + self.wire_bytes(self.slots[number])
            most = max(held.values())
            _, writer = min((loads[rank], rank) for rank, nbytes in held.items() if nbytes == most)
            loads[writer] += sizes[index]
            jobs[writer] += [Job(number, self._sources(number, writer)) for number in atoms[index]]
        return [sorted(row, key=lambda job: job.number) for row in jobs]

    def _sources(self, number: int, writer: int) -> tuple[int, ...]:
        """Of each shard the writer itself where it holds it, else one of the copies, another for each slot."""
        slot, found = self.slots[number], []
        for shard in range(self.placement.num_shards(slot)):
            holders = self._holders.of(slot, shard)
            found.append(writer if writer in holders else holders[number % len(holders)])
        return tuple(found)

    def _turns(self, jobs: Sequence[Sequence[Job]]) -> Iterator[dict[int, tuple[Job, ...]]]:
        at = [0] * len(jobs)
        open_writers = [writer for writer, row in enumerate(jobs) if row]
        while open_writers:
            sent: dict[int, int] = {}
            turn: dict[int, tuple[Job, ...]] = {}
            for writer in open_writers:
                begin, filled = at[writer], 0
                while at[writer] < len(jobs[writer]):
                    job = jobs[writer][at[writer]]
                    slot = self.slots[job.number]
                    nbytes, shard_bytes = max(self._sizes[job.number], self._gathered(slot)), self.wire_bytes(slot)
                    others = [source for source in job.sources if source != writer]
                    is_full = filled and filled + nbytes > self._turn_bytes
                    if is_full or any(
                        sent.get(source) and sent[source] + shard_bytes > self._turn_bytes for source in others
                    ):
                        break
                    for source in others:
                        sent[source] = sent.get(source, 0) + shard_bytes
                    filled += nbytes
                    at[writer] += 1
                if at[writer] > begin:
                    turn[writer] = tuple(jobs[writer][begin : at[writer]])
            open_writers = [writer for writer in open_writers if at[writer] < len(jobs[writer])]
            yield turn

    def _gathered(self, slot: Slot) -> int:
        return self.wire_bytes(slot) * self.placement.num_shards(slot)

    def _groups(self) -> Iterator[tuple[int, list[int]]]:
        """(writer, numbers of the slots) of each file."""
        for writer in range(self.trainer.world_size):
            numbers = [job.number for turn in self.turns for job in turn.get(writer, ())]
            group: list[int] = []
            filled = 0
            for number in numbers:
                if group and filled + self._sizes[number] > self._file_bytes:
                    yield writer, group
                    group, filled = [], 0
                group.append(number)
                filled += self._sizes[number]
            if group:
                yield writer, group


def entries_of(slot: Slot, tensor: HfTensor, serves: str) -> Iterator[Entry]:
    """What stands in a file of one tensor of a slot: the tensor, and after it the scales of its FP8 blocks."""
    kind = dtype_of(slot, tensor, serves)
    yield tensor.name, _FORMAT[kind], tensor.shape
    if kind == "fp8":
        yield tensor.name + fp8_blocks.SCALE_SUFFIX, "F32", fp8_blocks.scale_shape(tensor.shape)
