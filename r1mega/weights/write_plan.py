"""Which trainer rank writes which tensors of a checkpoint, into which files: integers alone.

Each rank writes what it owns (`spread_plan`). It has its own files, of `file_bytes` at most, whole tensors one after
the other as the turns bring them. Every rank knows all of them, so the index is written without asking anyone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from r1mega.models.hf_fields import HfFields
from r1mega.models.safetensors_file import Stored, lay_out
from r1mega.parallel.layout import Layout
from r1mega.weights.spread_plan import SpreadPlan

FILE_BYTES = 4 << 30


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


class WritePlan(SpreadPlan):
    """The plan of one checkpoint. `serves` is the dtype of the files; other arguments are SpreadPlan's."""

    def __init__(self, fields: HfFields, trainer: Layout, *, file_bytes: int = FILE_BYTES, **options: Any) -> None:
        self._file_bytes = file_bytes
        super().__init__(fields, trainer, **options)

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
