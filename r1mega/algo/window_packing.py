"""Packs a window of many samples so tightly that an update is a fixed number of full chunks. Integers in, integers out.

`algo.packing` packs the few samples of one update, whose number is given; here the number of chunks is given, and an
update has as many samples as they hold. Best fit of thousands of samples at once leaves next to no room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from r1mega.algo.packing import Chunk, Plan, deal


def pack_window(
    lengths: Sequence[int], *, max_tokens: int, multiple: int, carried: Sequence[Sequence[int]] = ()
) -> tuple[list[Chunk], list[Chunk]]:
    """Packs a window into chunks of which a multiple is ready, and others that wait, open, for the next window.

    Best fit: each sample, longest first, goes into the fullest chunk that has room for it. The emptiest chunks wait, at
    least one and at most `multiple`; the next window is given them as `carried` and fills them first.

    What holds of every result:
      - each sample stands in exactly one chunk, ready or waiting; no chunk is over `max_tokens`;
      - the number of ready chunks is a multiple of `multiple`; from 1 to `multiple` chunks wait;
      - carried samples stay together, and where any chunk is ready, all carried ones are: none waits for two windows
        that gave chunks;
      - no two ready chunks that were not carried would fit into one;
      - ready chunks come carried ones first, then as they were opened: by their longest sample, which comes first.

    O(n log n) for n samples, and n moves within a list of at most `max_tokens` numbers.

    Args:
        lengths: tokens of each sample of the window, those carried among them, >= 1.
        max_tokens: the most tokens of a chunk.
        multiple: ready chunks come in such numbers: those of an update.
        carried: indices of samples, chunk by chunk, as the window before left them; at most `multiple` chunks.

    Returns:
        The ready chunks and the waiting ones, as lists of indices into `lengths`. Where the window does not make more
        than `multiple` chunks, none is ready and all wait: give it more samples.

    Raises:
        ValueError: no samples, a sample longer than `max_tokens`, a count below 1.
    """
    _check(lengths, max_tokens, multiple)
    chunks = [list(chunk) for chunk in carried]
    assert len(chunks) <= multiple and all(chunks), "carried chunks are those that a window left"
    room = _fill(lengths, chunks, max_tokens)
    num_ready = (len(chunks) - 1) // multiple * multiple
    if num_ready == 0:
        return [], chunks
    fresh = sorted(range(len(carried), len(chunks)), key=lambda number: (-room[number], -number))
    waiting = sorted(fresh[: len(chunks) - num_ready])
    waits = set(waiting)
    return [chunk for number, chunk in enumerate(chunks) if number not in waits], [chunks[n] for n in waiting]


def plan_chunks(lengths: Sequence[int], chunks: Sequence[Sequence[int]], *, dp: int, max_tokens: int) -> Plan:
    """Deals the chunks of an update to the data-parallel ranks, each rank alike many.

    Full chunks have alike many tokens, but not alike much work: attention's grows with the squares of the lengths. So
    they are dealt by the sums of those, as evenly as `algo.packing.deal` does, and come most work first on every rank.

    Args:
        lengths: tokens of each sample of the update.
        chunks: indices into `lengths`, each exactly once.
        dp: data-parallel ranks.
        max_tokens: the most tokens of a chunk.

    Raises:
        ValueError: the number of chunks does not divide by `dp`, or there is none.
    """
    if dp < 1 or not chunks or len(chunks) % dp:
        raise ValueError(f"chunks: got {len(chunks)}; must be a multiple of the {dp} data-parallel ranks, and not none")
    work = [sum(lengths[index] ** 2 for index in chunk) for chunk in chunks]
    return Plan(tuple(lengths), max_tokens, tuple(tuple(tuple(chunks[i]) for i in rank) for rank in deal(work, dp)))


def _fill(lengths: Sequence[int], chunks: list[Chunk], max_tokens: int) -> list[int]:
    """Puts every sample that is in no chunk into one, opening new ones; returns the room left in each."""
    room = [max_tokens - sum(lengths[index] for index in chunk) for chunk in chunks]
    assert min(room, default=0) >= 0, "a carried chunk is over max_tokens"
    with_room: dict[int, list[int]] = {}  # room -> the chunks that have just that
    rooms: list[int] = []  # its keys, rising
    for number, free in enumerate(room):
        _put(with_room, rooms, free, number)
    held = {index for chunk in chunks for index in chunk}
    fresh = (index for index in range(len(lengths)) if index not in held)
    for index in sorted(fresh, key=lambda index: (-lengths[index], index)):
        size = lengths[index]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            number = len(chunks)
            chunks.append([index])
            room.append(max_tokens - size)
        else:
            number = with_room[rooms[at]].pop()
            if not with_room[rooms[at]]:
                del with_room[rooms.pop(at)]
            chunks[number].append(index)
            room[number] -= size
        _put(with_room, rooms, room[number], number)
    return room


def _put(with_room: dict[int, list[int]], rooms: list[int], free: int, number: int) -> None:
    if free in with_room:
        with_room[free].append(number)
    elif free:  # a full chunk is looked at no more
        with_room[free] = [number]
        insort(rooms, free)


def _check(lengths: Sequence[int], max_tokens: int, multiple: int) -> None:
    for name, value in (("max_tokens", max_tokens), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1")
    if not len(lengths):
        raise ValueError("lengths: got no samples; a window needs at least one")
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_tokens:
            raise ValueError(
                f"lengths[{index}]: got {length} tokens; must be from 1 to max_tokens = {max_tokens}; "
                "raise the tokens of a chunk, or leave this sample out"
            )
