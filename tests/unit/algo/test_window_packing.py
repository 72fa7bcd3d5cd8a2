from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.algo.window_packing import pack_window, plan_chunks

MAX_TOKENS = 64
WINDOWS = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=80)


@settings(deadline=None, max_examples=200)
@given(st.lists(WINDOWS, min_size=1, max_size=6), st.integers(1, 5))
def test_invariants_over_many_windows(windows, multiple):
    """Sample (window, place) -> its length; each window is given what the one before has left."""
    carried: list[list[tuple[int, int]]] = []
    seen: list[tuple[int, int]] = []
    length_of = {}
    for number, fresh in enumerate(windows):
        length_of |= {(number, place): length for place, length in enumerate(fresh)}
        before = [key for chunk in carried for key in chunk]
        keys = [*before, *((number, place) for place in range(len(fresh)))]
        places = iter(range(len(before)))
        lengths = [length_of[key] for key in keys]
        given = [[next(places) for _ in chunk] for chunk in carried]
        ready, waiting = pack_window(lengths, max_tokens=MAX_TOKENS, multiple=multiple, carried=given)
        assert (ready, waiting) == pack_window(lengths, max_tokens=MAX_TOKENS, multiple=multiple, carried=given)
        assert sorted(index for chunk in ready + waiting for index in chunk) == list(range(len(keys)))
        tokens = [sum(lengths[index] for index in chunk) for chunk in ready + waiting]
        assert all(0 < count <= MAX_TOKENS for count in tokens)
        assert len(ready) % multiple == 0
        assert 1 <= len(waiting) <= multiple
        if ready:  # none is starved: all that waited are the first to go, each chunk still whole
            assert [chunk[: len(part)] for chunk, part in zip(ready, given, strict=False)] == given
        own = sorted(tokens[len(given) : len(ready)])
        assert all(a + b > MAX_TOKENS for a, b in zip(own, own[1:], strict=False))
        seen += [keys[index] for chunk in ready for index in chunk]
        carried = [[keys[index] for index in chunk] for chunk in waiting]
    assert sorted([*seen, *(key for chunk in carried for key in chunk)]) == sorted(length_of)


def test_hand_worked():
    # longest first: 9 | 7 | 6; 4 best fits beside 6 (room 4); 3 beside 7 (room 3); 2 finds room 1 only: a chunk of its
    # own. Of the four chunks one waits at least: the emptiest is that of 2. Pairs of chunks: two are ready, two wait,
    # and of 9, 7 + 3, 6 + 4 the emptiest is 9.
    lengths = [2, 9, 3, 7, 6, 4]
    assert pack_window(lengths, max_tokens=10, multiple=1) == ([[1], [3, 2], [4, 5]], [[0]])
    assert pack_window(lengths, max_tokens=10, multiple=2) == ([[3, 2], [4, 5]], [[1], [0]])
    # carried chunks hold 9 and 2; of 8 7 1 the 8 best fits beside 2, the 1 beside 9, and 7 waits
    ready, waiting = pack_window([9, 2, 8, 7, 1], max_tokens=10, multiple=2, carried=[[0], [1]])
    assert (ready, waiting) == ([[0, 4], [1, 2]], [[3]])
    # what makes no more chunks than an update has waits as a whole
    assert pack_window([5, 5, 4], max_tokens=10, multiple=2) == ([], [[0, 1], [2]])


def test_a_window_of_many_fills_chunks_that_few_leave_open():
    draw = random.Random(0)
    lengths = [min(4096, max(8, int(draw.lognormvariate(6, 1)))) for _ in range(2000)]
    ready, _ = pack_window(lengths, max_tokens=4096, multiple=8)
    used = sum(lengths[index] for chunk in ready for index in chunk)
    assert used / (len(ready) * 4096) > 0.995
    # negative control: the same samples end to end in the order given
    chunks, tokens = 1, 0
    for length in lengths:
        if tokens + length > 4096:
            chunks, tokens = chunks + 1, 0
        tokens += length
    assert sum(lengths) / (chunks * 4096) < 0.95


@settings(deadline=None, max_examples=100)
@given(WINDOWS, st.integers(1, 4), st.integers(1, 3))
def test_every_rank_is_dealt_as_many_chunks(lengths, dp, each):
    ready, _ = pack_window(lengths, max_tokens=MAX_TOKENS, multiple=dp * each)
    chunks = ready[: dp * each]
    if not chunks:
        return
    plan = plan_chunks(lengths, chunks, dp=dp, max_tokens=MAX_TOKENS)
    assert [len(rank) for rank in plan.chunks] == [each] * dp
    assert sorted(chunk for rank in plan.chunks for chunk in rank) == sorted(map(tuple, chunks))
    work = [[sum(lengths[index] ** 2 for index in chunk) for chunk in rank] for rank in plan.chunks]
    assert all(rank == sorted(rank, reverse=True) for rank in work)
    assert max(map(sum, work)) - min(map(sum, work)) <= max(map(max, work))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 11]}, r"lengths\[1\]: got 11 tokens; must be from 1 to max_tokens = 10"),
        ({"lengths": [0]}, r"lengths\[0\]: got 0 tokens"),
        ({"lengths": []}, "lengths: got no samples"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"multiple": 0}, "multiple: got 0"),
    ],
)
def test_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_window(**{"lengths": [3], "max_tokens": 10, "multiple": 1, **arguments})


def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="chunks: got 3; must be a multiple of the 2 data-parallel ranks"):
        plan_chunks([1, 1, 1], [[0], [1], [2]], dp=2, max_tokens=10)
