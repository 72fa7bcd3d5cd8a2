"""Which trainer rank owns which tensors, whole, and when their parts reach it: integers alone.

**Owners.** Any rank may own a tensor, or the lowest of each pipeline stage alone. Parameters that have to pass through
one rank (`together`: what an engine hashes as one) make an atom; each goes to the least loaded of the ranks that hold
most of it, the largest atoms first. So experts stay where they are, and what all ranks of a stage hold is spread over
them.

**Turns.** Each owner goes through its parameters in the table's order, and a turn is what fits in `turn_bytes` for
everyone: for an owner what it owns, for a sender what it sends. So memory is bounded on both sides, and where several
owners want the same rank's experts first, they take turns. What an engine's loader needs in one call is in one turn.

A plan is the same wherever it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from r1mega.models import fp8_blocks
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor, Slot
from r1mega.models.safetensors_file import nbytes_of
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout
from r1mega.weights.bucket import loaded_together
from r1mega.weights.holders import Holders
from r1mega.weights.served import wire_dtype
from r1mega.weights.slices import ITEM_BYTES, dtype_of

TURN_BYTES = 1 << 28
_FORMAT = {"fp32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype by safetensors' name, shape


@dataclass(frozen=True, slots=True)
class Job:
    """One parameter of an owner: `number` in the plan's slots, and of each shard the rank that hands it over."""

    number: int
    sources: tuple[int, ...]


class SpreadPlan:
    """The plan of one model.

    Args:
        serves: the dtype that tensors are wanted in, "fp32", "bf16" or "fp8" (for FP8 blocks with their scales; the
            rest in bf16). What is always kept in fp32 stays so.
        held: the dtype that the trainer holds weights in, "fp32" or "bf16".
        together: names of tensors that have to pass through one rank, group by group.
        turn_bytes: that a rank owns, and that it sends, in one turn; more only for what has to be in one turn.
        with_mtp: whether the multi-token-prediction layer is among it.
        one_owner: whether in each pipeline stage the lowest rank owns everything.

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
        with_mtp: bool = True,
        one_owner: bool = False,
    ) -> None:
        found = trainer.problems(fields.shape())
        if found:
            raise ValueError("\n".join(found))
        self.trainer, self.serves, self.held = trainer, serves, held
        self.placement = placement_of(fields, trainer)
        self.slots = [
            slot for slot in slots_of(fields) if not slot.is_copy and (with_mtp or not slot.name.startswith("mtp."))
        ]
        self._turn_bytes, self._one_owner = turn_bytes, one_owner
        self._holders = Holders(self.placement, trainer)
        self._entries = [list(self._entries_of(slot)) for slot in self.slots]
        self._sizes = [sum(nbytes_of(kind, shape) for _, kind, shape in entries) for entries in self._entries]
        jobs = self._deal(self._atoms(together))
        self.turns: list[dict[int, tuple[Job, ...]]] = list(self._turns(jobs))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._sizes)

    def wire_bytes(self, slot: Slot) -> int:
        """Bytes of one shard of the slot as it is handed over, padding of the vocabulary left out."""
        item = ITEM_BYTES[wire_dtype(slot, self.serves, self.held)]
        return item * sum(math.prod(tensor.shape) for tensor in slot.tensors) // self.placement.num_shards(slot)

    def tensors_of(self, owner: int) -> set[str]:
        """Names of the table's tensors that pass through an owner, in plain numbers."""
        return {
            tensor.name
            for turn in self.turns
            for job in turn.get(owner, ())
            for tensor in (*self.slots[job.number].tensors, *self.slots[job.number].aliases)
        }

    def _entries_of(self, slot: Slot) -> Iterator[Entry]:
        for tensor in (*slot.tensors, *slot.aliases):
            yield from entries_of(slot, tensor, self.serves)

    def _atoms(self, together: Iterable[Sequence[str]]) -> list[list[int]]:
        """Numbers of slots that go to one owner, in the order of their first."""
        number_of = {tensor.name: number for number, slot in enumerate(self.slots) for tensor in slot.tensors}
        number_of |= {alias.name: number for number, slot in enumerate(self.slots) for alias in slot.aliases}
        parent = list(range(len(self.slots)))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        loaded = (range(first, last) for first, last in loaded_together(self.slots))
        for numbers in (*([number_of[name] for name in names] for names in together), *loaded):
            first, *others = sorted({root(number) for number in numbers})
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
            if self._one_owner:
                owner = min(held) // self.trainer.per_stage * self.trainer.per_stage
            else:
                most = max(held.values())
                _, owner = min((loads[rank], rank) for rank, nbytes in held.items() if nbytes == most)
            loads[owner] += sizes[index]
            jobs[owner] += [Job(number, self._sources(number, owner)) for number in atoms[index]]
        return [sorted(row, key=lambda job: job.number) for row in jobs]

    def _sources(self, number: int, owner: int) -> tuple[int, ...]:
        """Of each shard the owner itself where it holds it, else one of the copies, another for each slot."""
        slot, found = self.slots[number], []
        for shard in range(self.placement.num_shards(slot)):
            holders = self._holders.of(slot, shard)
            found.append(owner if owner in holders else holders[number % len(holders)])
        return tuple(found)

    def _turns(self, jobs: Sequence[Sequence[Job]]) -> Iterator[dict[int, tuple[Job, ...]]]:
        rows = [
            [tuple(row[first:last]) for first, last in loaded_together([self.slots[job.number] for job in row])]
            for row in jobs
        ]
        at = [0] * len(rows)
        open_owners = [owner for owner, row in enumerate(rows) if row]
        while open_owners:
            sent: dict[int, int] = {}
            turn: dict[int, tuple[Job, ...]] = {}
            for owner in open_owners:
                begin, filled = at[owner], 0
                while at[owner] < len(rows[owner]):
                    unit = rows[owner][at[owner]]
                    nbytes, out = sum(map(self._room_of, unit)), self._sent_for(unit, owner)
                    is_full = filled and filled + nbytes > self._turn_bytes
                    if is_full or any(
                        sent.get(source) and sent[source] + more > self._turn_bytes for source, more in out.items()
                    ):
                        break
                    for source, more in out.items():
                        sent[source] = sent.get(source, 0) + more
                    filled += nbytes
                    at[owner] += 1
                if at[owner] > begin:
                    turn[owner] = tuple(job for unit in rows[owner][begin : at[owner]] for job in unit)
            open_owners = [owner for owner in open_owners if at[owner] < len(rows[owner])]
            yield turn

    def _room_of(self, job: Job) -> int:
        """Bytes of a parameter, or of its shards if these are more."""
        slot = self.slots[job.number]
        return max(self._sizes[job.number], self.wire_bytes(slot) * self.placement.num_shards(slot))

    def _sent_for(self, unit: Sequence[Job], owner: int) -> dict[int, int]:
        """Bytes that each other rank sends the owner for these."""
        found: dict[int, int] = {}
        for job in unit:
            for source in job.sources:
                if source != owner:
                    found[source] = found.get(source, 0) + self.wire_bytes(self.slots[job.number])
        return found


def entries_of(slot: Slot, tensor: HfTensor, serves: str) -> Iterator[Entry]:
    """What is given of one tensor of a slot: the tensor, and after it the scales of its FP8 blocks."""
    kind = dtype_of(slot, tensor, serves)
    yield tensor.name, _FORMAT[kind], tensor.shape
    if kind == "fp8":
        yield tensor.name + fp8_blocks.SCALE_SUFFIX, "F32", fp8_blocks.scale_shape(tensor.shape)
