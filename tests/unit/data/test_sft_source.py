"""Which rows come when: each once in an epoch, chunks full, and the same after a resumption at any update."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.order import EpochOrder
from r1mega.data.sft_source import BatchSource, WindowSource

MAX_TOKENS = 64


def order(count: int, seed: int = 5, *, shuffle: bool = True, content: str = "c") -> EpochOrder:
    return EpochOrder(count, seed, shuffle, content)


def windows(lengths: list[int], window: int, per_update: int, **options) -> WindowSource:
    return WindowSource(
        order(len(lengths), **options), lengths, window=window, max_tokens=MAX_TOKENS, chunks_per_update=per_update
    )


def draw(count: int, seed: int = 0) -> list[int]:
    found = random.Random(seed)
    return [min(MAX_TOKENS, max(1, int(found.lognormvariate(2, 1)))) for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60), st.integers(1, 30), st.integers(1, 4))
def test_updates_hold_whole_epochs_and_resume_anywhere(lengths, window, per_update):
    source, updates, states = windows(lengths, window, per_update), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(source.state_dict())))
        updates.append(source.next())
    for update in updates:
        assert len(update.chunks) == per_update
        assert sorted(place for chunk in update.chunks for place in chunk) == list(range(len(update.rows)))
        assert all(0 < sum(lengths[update.rows[i]] for i in chunk) <= MAX_TOKENS for chunk in update.chunks)
    # What was taken, is ready and waits are whole epochs and the beginning of one: nothing lost, nothing twice.
    ready = source._ready[source._taken * per_update :] + source._waiting
    drawn = Counter(row for update in updates for row in update.rows) + Counter(row for c in ready for row in c)
    assert len(drawn) == len(lengths) or source.epoch == 0
    assert set(drawn.values()) <= {source.epoch, source.epoch + 1}
    for at in (0, 5, 11):
        resumed = windows(lengths, window, per_update)
        resumed.load_state_dict(states[at])
        assert [resumed.next() for _ in updates[at:]] == updates[at:]


def test_nothing_is_lost_and_chunks_are_full():
    lengths = draw(4000)
    source = windows(lengths, 1000, 4)
    updates = []
    while source.epoch == 0:
        updates.append(source.next())
    rows = Counter(row for update in updates[:-1] for row in update.rows)
    assert max(rows.values()) == 1, "no row twice in an epoch"
    missing = sum(lengths[row] for row in range(4000) if not rows[row])
    assert missing <= 4 * MAX_TOKENS  # what waits: an update's chunks at most
    tokens = sum(lengths[row] for row in rows)
    assert tokens / ((len(updates) - 1) * 4 * MAX_TOKENS) > 0.99
    sizes = [sum(lengths[row] for row in update.rows) for update in updates]
    assert min(sizes) > 0.97 * max(sizes)
    # long samples do not come first: the chunks of a window are shuffled
    longest = [max(lengths[row] for row in update.rows) for update in updates[:10]]
    assert longest != sorted(longest, reverse=True)


def test_without_shuffling_rows_come_about_in_order():
    lengths = draw(400)
    source = windows(lengths, 50, 2, shuffle=False)
    firsts = [min(source.next().rows) for _ in range(20)]
    # never back by more than a window, which shuffled rows are
    assert all(first > max(firsts[: at + 1]) - 50 for at, first in enumerate(firsts))
    assert firsts[-1] > 150
    plain = [windows(lengths, 50, 2, seed=seed).next() for seed in (5, 6)]
    assert plain[0] != plain[1] and plain[0] == windows(lengths, 50, 2).next()


def test_a_state_of_other_packing_is_refused():
    lengths = draw(50)
    source = windows(lengths, 20, 2)
    source.next()
    state = source.state_dict()
    with pytest.raises(ValueError, match="windows of chunks_per_update=2, this run has 3"):
        windows(lengths, 20, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="windows of rows=20, this run has 10"):
        windows(lengths, 10, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="content='c', this run has 'd'"):
        windows(lengths, 20, 2, content="d").load_state_dict(state)
    batches = BatchSource(order(50), 4)
    with pytest.raises(ValueError, match="of sft.packing=window, this run has batch"):
        batches.load_state_dict(state)
    with pytest.raises(ValueError, match="of sft.packing=batch, this run has window"):
        windows(lengths, 20, 2).load_state_dict(batches.state_dict())


def test_batches_are_shuffled_by_the_seed_and_resume_exactly():
    source = BatchSource(order(9), 9)
    first = source.next().rows
    assert first != tuple(range(9)) and sorted(first) == list(range(9))
    source = BatchSource(order(9), 4)
    taken = [source.next() for _ in range(3)]
    assert (taken[0].rows + taken[1].rows + taken[2].rows)[:9] == first, "the order does not depend on the batch"
    assert taken[0].chunks is None
    resumed = BatchSource(order(9), 4)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert [resumed.next() for _ in range(4)] == [source.next() for _ in range(4)]
    with pytest.raises(ValueError, match="content="):
        BatchSource(order(9, content="d"), 4).load_state_dict(source.state_dict())
