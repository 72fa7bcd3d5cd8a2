"""Plans which samples are computed together. Integers in, integers out; nothing random but `split_updates`, by seed.

A *chunk* is what one micro-batch holds: samples laid end to end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Chunk = list[int]  # indices of samples


@dataclass(frozen=True)
class Plan:
    """Which samples each data-parallel rank computes in each of its micro-batches.

    `chunks[rank][i]` are the indices of the samples of micro-batch i of a rank; every rank has the same number of them.
    """

    lengths: tuple[int, ...]
    max_tokens: int
    chunks: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_chunks(self) -> int:
        """Micro-batches of each rank."""
        return len(self.chunks[0])

    def rank_tokens(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(self.chunk_tokens(chunk) for chunk in rank) for rank in self.chunks]

    def chunk_tokens(self, chunk: Sequence[int]) -> int:
        """Tokens of the samples of one chunk, without padding."""
        return sum(self.lengths[index] for index in chunk)

    def fill(self) -> float:
        """Tokens over the room for them, num_chunks x ranks x max_tokens: from 0 to 1."""
        return sum(self.lengths) / (self.num_chunks * len(self.chunks) * self.max_tokens)

    def padded_fill(self) -> float:
        """Tokens over what they take where each chunk is padded to its longest sample: from 0 to 1."""
        padded = sum(
            len(chunk) * max(self.lengths[index] for index in chunk) for rank in self.chunks for chunk in rank if chunk
        )
        return sum(self.lengths) / padded


def plan_batch(lengths: Sequence[int], *, dp: int, max_tokens: int, multiple_of_count: int = 1) -> Plan:
    """Cuts the samples of one update into micro-batches, as DeepSeek-R1's appendix B.1 describes it.

    1. Sort by length. 2. Deal to the ranks (see `deal`). 3. Best fit into chunks of at most `max_tokens` gives how
    many chunks a rank needs. 4. All ranks get the largest such number, rounded up to `multiple_of_count`.

    Where a rank's samples, kept in order of length, can be cut into that many chunks, they are (see `_cut_in_order`):
    then the samples of a chunk are of like length, and the chunks of like size. Else the best-fit chunks stand, split
    as often as needed.

    What holds of every plan:
      - each sample stands in exactly one chunk, and no chunk is over `max_tokens`;
      - all ranks have the same number of chunks, a multiple of `multiple_of_count`;
      - numbers of samples differ by at most one between ranks, numbers of tokens by at most the longest sample;
      - before rounding up, the number of chunks is below 2 x (tokens of a rank) / max_tokens, or 1;
      - no chunk is empty unless there are fewer samples than ranks x chunks; empty chunks come last;
      - chunks come by tokens, most first: what does not fit into memory shows at once, and micro-batch i is of like
        size on all ranks.

    Args:
        lengths: tokens of each sample, prompt and response, >= 1.
        dp: data-parallel ranks.
        max_tokens: the most tokens of a chunk.
        multiple_of_count: the number of chunks of a rank is a multiple of it (interleaved pipelines ask for it).

    Raises:
        ValueError: no samples, a sample longer than `max_tokens`, or a count below 1.
    """
    _check(lengths, dp, max_tokens, multiple_of_count)
    ranks = deal(lengths, dp)
    packed = [_best_fit(lengths, rank, max_tokens) for rank in ranks]
    needed = max(len(bins) for bins in packed)
    count = -(-needed // multiple_of_count) * multiple_of_count
    chunks = []
    for rank, bins in zip(ranks, packed, strict=True):
        in_order = _cut_in_order(lengths, rank, max_tokens, count)
        ready = _split_until(lengths, bins if in_order is None else in_order, count)
        ready.sort(key=lambda chunk: -sum(lengths[index] for index in chunk))
        chunks.append(tuple(tuple(chunk) for chunk in ready))
    return Plan(tuple(lengths), max_tokens, tuple(chunks))


def plan_pairs(lengths: Sequence[int], *, dp: int, max_tokens: int, multiple_of_count: int = 1) -> Plan:
    """`plan_batch` of samples that come in pairs, 2 i and 2 i + 1, which stay neighbours in one chunk.

    Raises:
        ValueError: an odd number of samples; a pair longer than `max_tokens`; else as `plan_batch`.
    """
    if len(lengths) % 2:
        raise ValueError(f"lengths: got {len(lengths)} samples; must be pairs; give both of each")
    both = [sum(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    plan = plan_batch(both, dp=dp, max_tokens=max_tokens, multiple_of_count=multiple_of_count)
    chunks = tuple(
        tuple(tuple(index for pair in chunk for index in (2 * pair, 2 * pair + 1)) for chunk in rank)
        for rank in plan.chunks
    )
    return Plan(tuple(lengths), max_tokens, chunks)


def split_updates(
    num_samples: int, num_updates: int, *, seed: int | str, group_size: int = 1, keep_groups: bool = False
) -> list[list[int]]:
    """Splits the samples of a round at random into the batches of its updates.

    DeepSeek-R1 splits 8,192 outputs into 16 batches. It does not say whether the outputs of a question stay together;
    `keep_groups` keeps each run of `group_size` samples in one batch.

    Args:
        num_samples: samples of the round, the groups one after another.
        num_updates: batches wanted.
        seed: decides the split. A string may name more than a number, such as "7/round 3".
        group_size: samples of a question; used by `keep_groups` alone.
        keep_groups: see above.

    Returns:
        `num_updates` lists of sample indices, each ascending, of equal length; together each index once.

    Raises:
        ValueError: the samples, or the groups where they stay together, do not divide by the number of updates.
    """
    unit = group_size if keep_groups else 1
    if num_updates < 1 or unit < 1:
        raise ValueError(f"num_updates, group_size: got {num_updates}, {group_size}; both must be at least 1")
    if num_samples % (unit * num_updates) != 0:
        what = f"groups of {group_size}" if keep_groups else "samples"
        raise ValueError(
            f"num_updates: got {num_updates} for {num_samples} samples; must divide the number of {what}; "
            "change the updates or the questions of a round"
        )
    units = list(range(num_samples // unit))
    random.Random(seed).shuffle(units)
    size = len(units) // num_updates
    batches = [sorted(units[number * size : (number + 1) * size]) for number in range(num_updates)]
    return [[first * unit + offset for first in batch for offset in range(unit)] for batch in batches]


def _check(lengths: Sequence[int], dp: int, max_tokens: int, multiple_of_count: int) -> None:
    for name, value in (("dp", dp), ("max_tokens", max_tokens), ("multiple_of_count", multiple_of_count)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1")
    if not lengths:
        raise ValueError("lengths: got no samples; an update needs at least one")
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_tokens:
            raise ValueError(
                f"lengths[{index}]: got {length} tokens; must be from 1 to max_tokens = {max_tokens}; "
                "raise the tokens of a micro-batch, or shorten prompts and responses"
            )


def deal(lengths: Sequence[int], dp: int) -> list[Chunk]:
    """Deals the samples, longest first, in blocks of `dp`: of each block, the lightest rank gets the longest.

    Let the ranks' loads rise, a_1 <= ... <= a_dp, and the block's lengths fall, b_1 >= ... >= b_dp. The new loads of
    two ranks i < j differ by |(a_j - a_i) - (b_i - b_j)|, at most the larger of the two. So loads never differ by more
    than the largest spread b_1 - b_dp of a block, with what the last block lacks counted as 0: never by more than the
    longest sample.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ranks: list[Chunk] = [[] for _ in range(dp)]
    loads = [0] * dp
    for start in range(0, len(order), dp):
        lightest_first = sorted(range(dp), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(lightest_first, order[start : start + dp], strict=False):
            ranks[rank].append(index)
            loads[rank] += lengths[index]
    return ranks


def _best_fit(lengths: Sequence[int], samples: Chunk, max_tokens: int) -> list[Chunk]:
    """Each sample, longest first, into the fullest chunk that still has room for it."""
    bins: list[Chunk] = []
    room: list[int] = []
    for index in samples:
        fitting = [number for number, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            number = min(fitting, key=lambda number: room[number])
            bins[number].append(index)
            room[number] -= lengths[index]
        else:
            bins.append([index])
            room.append(max_tokens - lengths[index])
    return bins


def _cut_in_order(lengths: Sequence[int], samples: Chunk, max_tokens: int, count: int) -> list[Chunk] | None:
    """Cuts the samples, in their order, into at most `count` runs; None where `max_tokens` makes that impossible.

    Of all such cuts it takes one whose largest run, padded to its longest sample, is as small as can be: that evens out
    the runs and parts the long samples from the short ones.
    """
    if not samples:
        return []
    room = len(samples) * lengths[samples[0]]  # what all take in one run; no run is larger
    if len(_runs(lengths, samples, max_tokens, room)) > count:
        return None
    low = lengths[samples[0]]
    while low < room:
        middle = (low + room) // 2
        if len(_runs(lengths, samples, max_tokens, middle)) <= count:
            room = middle
        else:
            low = middle + 1
    return _runs(lengths, samples, max_tokens, low)


def _runs(lengths: Sequence[int], samples: Chunk, max_tokens: int, room: int) -> list[Chunk]:
    """The fewest runs of neighbours, longest first, of at most `max_tokens` each and at most `room` when padded."""
    runs: list[Chunk] = []
    tokens = 0
    for index in samples:
        if not runs or tokens + lengths[index] > max_tokens or (len(runs[-1]) + 1) * lengths[runs[-1][0]] > room:
            runs.append([])
            tokens = 0
        runs[-1].append(index)
        tokens += lengths[index]
    return runs


def _split_until(lengths: Sequence[int], chunks: list[Chunk], count: int) -> list[Chunk]:
    """Halves the largest chunk that has two samples or more until there are `count`; then adds empty ones."""
    chunks = [list(chunk) for chunk in chunks]
    while len(chunks) < count:
        divisible = [chunk for chunk in chunks if len(chunk) > 1]
        if not divisible:
            return chunks + [[] for _ in range(count - len(chunks))]
        largest = max(divisible, key=lambda chunk: sum(lengths[index] for index in chunk))
        half, tokens = 0, sum(lengths[index] for index in largest) / 2
        while half < len(largest) - 1 and tokens > 0:
            tokens -= lengths[largest[half]]
            half += 1
        chunks.append(largest[half:])
        del largest[half:]
    return chunks
