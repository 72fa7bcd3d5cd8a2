"""The table of a model in buckets: tensors that are sent together and handed to an engine's loader in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from r1mega.models.param_map import Slot

# SGLang's DeepSeek loader joins these two of a layer and forgets the first at the end of a call in which the second did
# not come, without a word (`cached_a_proj` in models/deepseek_common/deepseek_weight_loader.py).
_LOADED_TOGETHER = ((".q_a_proj.weight", ".kv_a_proj_with_mqa.weight"),)


@dataclass(frozen=True)
class Bucket:
    """Consecutive slots of one pipeline stage.

    Args:
        index: in the one global order.
        stage: whose ranks send it. Buckets of different stages have no sender in common.
        begin: the first of its slots, as a number in the plan's `slots`; `end` is the last, exclusive.
    """

    index: int
    stage: int
    begin: int
    end: int


def in_turn(slots: Sequence[Slot], block: int) -> list[Slot]:
    """The slots in their order, but of the experts that follow each other one of each `block` experts in turn.

    In the table's own order a bucket without all experts of a layer would hold those of few ranks: they alone would
    send, and receive, and all others wait.
    """
    runs = groupby(slots, key=lambda slot: slot.expert is not None)
    return [slot for _, run in runs for slot in sorted(run, key=lambda slot: _turn(slot, block))]


def _turn(slot: Slot, block: int) -> tuple[int, int]:
    """Alike for all that stay in their order: the slots of one expert, and those of none."""
    return (0, 0) if slot.expert is None else (slot.expert % block, slot.expert)


def buckets_of(
    slots: Sequence[Slot],
    *,
    stage_of: Callable[[Slot], int],
    blocks_of: Callable[[Slot], tuple[int, ...]],
    nbytes_of: Callable[[Slot], int],
    limit: int,
) -> list[Bucket]:
    """As many slots to a bucket as leave every engine rank's part of it within `limit` bytes.

    A bucket ends where the stage changes. What the loader needs in one call stays in one bucket, which alone may be
    larger than the limit.

    Args:
        blocks_of: which block of experts of each expert cut owns the slot; empty where every rank needs it.
    """
    buckets: list[Bucket] = []
    begin, stage, filled = 0, None, _Filled()
    for first, last in loaded_together(slots):
        atom = slots[first:last]
        sizes = [(blocks_of(slot), nbytes_of(slot)) for slot in atom]
        here = stage_of(atom[0])
        if first > begin and (here != stage or filled.worst_with(sizes) > limit):
            assert stage is not None
            buckets.append(Bucket(len(buckets), stage, begin, first))
            begin, filled = first, _Filled()
        stage = here
        filled.add(sizes)
    if stage is not None:
        buckets.append(Bucket(len(buckets), stage, begin, len(slots)))
    return buckets


class _Filled:
    """Bytes of a bucket so far: what all need, and what each block of experts needs besides."""

    def __init__(self) -> None:
        self.common = self.worst_block = 0
        self.of_block: dict[tuple[int, int], int] = {}

    def add(self, sizes: Sequence[tuple[tuple[int, ...], int]]) -> None:
        for blocks, nbytes in sizes:
            if not blocks:
                self.common += nbytes
            for key in enumerate(blocks):
                self.of_block[key] = self.of_block.get(key, 0) + nbytes
                self.worst_block = max(self.worst_block, self.of_block[key])

    def worst_with(self, sizes: Sequence[tuple[tuple[int, ...], int]]) -> int:
        """Bytes of the rank that needs most, were these added. Each block is asked about alone: atoms are small."""
        common = self.common + sum(nbytes for blocks, nbytes in sizes if not blocks)
        more = [self.of_block.get(key, 0) + nbytes for blocks, nbytes in sizes for key in enumerate(blocks)]
        return common + max([self.worst_block, *more])


def loaded_together(slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    """[first, last) of slots that must come in one call: each alone, and from one partner of a pair to the other."""
    position = 0
    names = {tensor.name: index for index, slot in enumerate(slots) for tensor in slot.tensors}
    while position < len(slots):
        last = position
        for tensor in slots[position].tensors:
            for one, other in _LOADED_TOGETHER:
                if tensor.name.endswith(one):
                    last = max(last, names[tensor.name.removesuffix(one) + other])
        yield position, last + 1
        position = last + 1
