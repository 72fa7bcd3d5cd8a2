from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.algo.packing import plan_batch, split_updates

MAX_TOKENS = 64
BATCHES = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60)


@settings(deadline=None, max_examples=200)
@given(BATCHES, st.integers(1, 5), st.integers(1, 4))
def test_invariants(lengths, dp, multiple):
    plan = plan_batch(lengths, dp=dp, max_tokens=MAX_TOKENS, multiple_of_count=multiple)
    assert len(plan.chunks) == dp
    assert sorted(index for rank in plan.chunks for chunk in rank for index in chunk) == list(range(len(lengths)))
    assert {len(rank) for rank in plan.chunks} == {plan.num_chunks}
    assert plan.num_chunks % multiple == 0
    tokens = [[plan.chunk_tokens(chunk) for chunk in rank] for rank in plan.chunks]
    assert all(0 <= count <= MAX_TOKENS for rank in tokens for count in rank)
    assert all(rank == sorted(rank, reverse=True) for rank in tokens)
    loads = plan.rank_tokens()
    assert sum(loads) == sum(lengths)
    assert max(loads) - min(loads) <= max(lengths)
    samples = [sum(len(chunk) for chunk in rank) for rank in plan.chunks]
    assert max(samples) - min(samples) <= 1
    if len(lengths) >= dp * plan.num_chunks:
        assert all(chunk for rank in plan.chunks for chunk in rank)
    # best fit leaves no two chunks that would fit into one
    needed = max(1, math.ceil(2 * max(loads) / MAX_TOKENS) - 1)
    assert plan.num_chunks <= math.ceil(needed / multiple) * multiple
    assert 0 < plan.fill() <= 1 and 0 < plan.padded_fill() <= 1


@settings(deadline=None, max_examples=30)
@given(BATCHES, st.integers(1, 4))
def test_the_same_lengths_give_the_same_plan(lengths, dp):
    assert plan_batch(lengths, dp=dp, max_tokens=MAX_TOKENS) == plan_batch(tuple(lengths), dp=dp, max_tokens=MAX_TOKENS)


def test_hand_worked_two_ranks():
    # longest first: 9 8 | 7 6 | 2 1 (samples 0 5 | 2 3 | 4 1)
    # rank 0 takes 9, rank 1 takes 8; rank 1 is lighter and takes 7 (15), rank 0 takes 6 (15);
    # equal, so rank 0 takes 2 (17) and rank 1 takes 1 (16).
    # Both need two chunks of at most 10: rank 0 9 | 6 2 and rank 1 8 | 7 1, which also follow the order of length.
    plan = plan_batch([9, 1, 7, 6, 2, 8], dp=2, max_tokens=10)
    assert plan.chunks == (((0,), (3, 4)), ((5,), (2, 1)))
    assert plan.rank_tokens() == [17, 16]
    assert plan.fill() == pytest.approx(33 / 40)
    # padded: 9 + 2 x 6 and 8 + 2 x 7
    assert plan.padded_fill() == pytest.approx(33 / 43)


def test_a_chunk_is_split_to_give_every_rank_as_many():
    # rank 0 takes 10, then the lighter rank 1 takes 9; of 8 and 1 the lighter rank 1 takes 8, rank 0 takes 1.
    # Rank 1 needs two chunks of at most 11 for 9 and 8; rank 0 could do with one for 10 and 1, and is split.
    plan = plan_batch([10, 9, 8, 1], dp=2, max_tokens=11)
    assert plan.chunks == (((0,), (3,)), ((1,), (2,)))
    # rounded up to a multiple: of the cuts in order, 4 3 | 2 1 take 8 and 4 when padded, 4 | 3 2 1 would take 4 and 9
    plan = plan_batch([4, 3, 2, 1], dp=1, max_tokens=10, multiple_of_count=2)
    assert plan.chunks == (((0, 1), (2, 3)),)


def test_a_chunk_is_empty_only_where_samples_lack():
    # rank 0 holds two samples that fill a chunk each, rank 1 one sample
    plan = plan_batch([10, 10, 10], dp=2, max_tokens=10)
    assert plan.chunks == (((0,), (2,)), ((1,), ()))


def test_best_fit_stands_where_the_order_of_length_would_need_more_chunks():
    # 6 6 6 4 4 4 fill three chunks of 10 exactly; in order of length they would need 6 | 6 | 6 4 | 4 4
    plan = plan_batch([6, 4, 6, 4, 6, 4], dp=1, max_tokens=10)
    assert [plan.chunk_tokens(chunk) for chunk in plan.chunks[0]] == [10, 10, 10]


def test_samples_of_like_length_share_a_chunk():
    lengths = [20, 3] * 16  # 368 tokens: four chunks of at most 120
    plan = plan_batch(lengths, dp=1, max_tokens=120)
    # in order of length, the padded size evened out: 6 x 20 | 6 x 20 | 4 x 20 and 2 x 3 | 14 x 3
    assert sorted(plan.chunk_tokens(chunk) for chunk in plan.chunks[0]) == [42, 86, 120, 120]
    assert plan.padded_fill() == pytest.approx(368 / (3 * 120 + 42))
    # negative control: chunks in the given order mix 20 and 3, 92 tokens in the room of 160
    mixed = sum(lengths) / sum(len(lengths[i : i + 8]) * max(lengths[i : i + 8]) for i in range(0, 32, 8))
    assert mixed == pytest.approx(92 / 160)


def test_like_lengths_fill_the_chunks():
    lengths = [18 + (7 * i) % 43 for i in range(256)]  # 18 to 60 tokens
    plan = plan_batch(lengths, dp=2, max_tokens=1024)
    assert plan.num_chunks == math.ceil(sum(lengths) / 2 / 1024)
    assert plan.padded_fill() > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 11]}, r"lengths\[1\]: got 11 tokens; must be from 1 to max_tokens = 10"),
        ({"lengths": [0]}, r"lengths\[0\]: got 0 tokens"),
        ({"lengths": []}, "lengths: got no samples"),
        ({"dp": 0}, "dp: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"multiple_of_count": 0}, "multiple_of_count: got 0"),
    ],
)
def test_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_batch(**{"lengths": [3], "dp": 1, "max_tokens": 10, **arguments})


def test_split_is_a_partition_that_the_seed_decides():
    batches = split_updates(8192, 16, seed=1)
    assert [len(batch) for batch in batches] == [512] * 16
    assert sorted(index for batch in batches for index in batch) == list(range(8192))
    assert batches == split_updates(8192, 16, seed=1)
    assert batches != split_updates(8192, 16, seed=2)
    # random and not in order: of the first batch's 512 samples about 512 / 16 = 32 are of the round's first 512
    assert 10 < sum(index < 512 for index in batches[0]) < 60


def test_groups_stay_together_only_when_asked():
    together = split_updates(64, 4, seed=3, group_size=4, keep_groups=True)
    for batch in together:
        groups = [index // 4 for index in batch]
        assert all(groups.count(group) == 4 for group in groups)
    apart = split_updates(64, 4, seed=3, group_size=4)
    assert any(sum(index // 4 == 0 for index in batch) not in (0, 4) for batch in apart)


def test_split_of_nothing_and_split_that_does_not_divide():
    assert split_updates(0, 3, seed=0) == [[], [], []]
    with pytest.raises(ValueError, match="num_updates: got 3 for 8 samples; must divide the number of samples"):
        split_updates(8, 3, seed=0)
    with pytest.raises(ValueError, match="got 4 for 8 samples; must divide the number of groups of 4"):
        split_updates(8, 4, seed=0, group_size=4, keep_groups=True)
    with pytest.raises(ValueError, match="must be at least 1"):
        split_updates(8, 0, seed=0)
