"""Which trainer ranks hold a copy of a shard."""

from __future__ import annotations

from r1mega.models.param_map import Placement, Slot
from r1mega.parallel.layout import Layout


class Holders:
    """Looked up once for all slots that are cut alike."""

    def __init__(self, placement: Placement, trainer: Layout) -> None:
        self._placement, self._trainer = placement, trainer
        self._found: dict[tuple, list[int]] = {}

    def of(self, slot: Slot, shard: int) -> list[int]:
        """The trainer ranks that hold a copy of the shard, ascending."""
        stage = self._placement.stage(slot)
        block = None if slot.expert is None else slot.expert // (self._placement.num_experts // self._trainer.ep)
        key = stage, slot.axis, block, shard
        if key not in self._found:
            first = stage * self._trainer.per_stage
            ranks = range(first, first + self._trainer.per_stage)
            self._found[key] = [rank for rank in ranks if self._placement.shard_on(slot, rank) == shard]
        return self._found[key]
