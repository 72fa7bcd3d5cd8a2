"""Every sequence that was asked for ends as one of used, carried and dropped, whatever order things happen in."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.rollout.buffer import Buffer, Draft, sample_of
from r1mega.types import Completion, FinishReason, Prompt, Span


def prompt(number: int) -> Prompt:
    return Prompt(str(number), "q", "a", (number,))


def piece(draft: Draft, version: int, finish: FinishReason) -> Completion:
    """One token more than there was."""
    before = draft.so_far
    tokens = [1] if before is None else [*before.token_ids, 1]
    spans = () if before is None else before.spans
    spans = (*spans, Span(version, len(tokens) - 1, len(tokens)))
    return Completion(0, draft.index, tokens, [0.0] * len(tokens), finish, version, spans)


def finish(buffer: Buffer, draft: Draft, version: int) -> bool:
    done = piece(draft, version, FinishReason.stop)
    return buffer.finish(draft, sample_of(draft.prompt, draft.index, done, ""), None)


def stop(buffer: Buffer, draft: Draft, version: int) -> None:
    draft.so_far = piece(draft, version, FinishReason.abort)
    buffer.put_back(draft)


def drain(buffer: Buffer, version: int) -> list[Draft]:
    return list(iter(lambda: buffer.next(version), None))


def test_older_groups_run_first_and_come_in_the_order_of_asking() -> None:
    buffer = Buffer(2, 0)
    buffer.ask([prompt(0), prompt(1), prompt(2)])
    drafts = drain(buffer, 1)
    assert [(d.prompt.id, d.index) for d in drafts] == [(p, i) for p in "012" for i in (0, 1)]
    for draft in [*drafts[4:], *drafts[:2]]:
        finish(buffer, draft, 1)
    assert buffer.num_complete == 2
    groups = buffer.take(2)
    assert [group.prompt.id for group in groups] == ["0", "2"]
    assert [sample.index for sample in groups[0].scored().samples] == [0, 1]
    with pytest.raises(AssertionError):
        buffer.take(1)


def test_complete_groups_of_the_oldest_weights_are_handed_out_first() -> None:
    buffer = Buffer(1, 4)
    buffer.ask([prompt(0), prompt(1), prompt(2)])
    first = buffer.next(1)
    later = drain(buffer, 2)
    for draft in [*reversed(later), first]:
        finish(buffer, draft, 2)
    assert [group.prompt.id for group in buffer.take(2)] == ["0", "2"]


def test_the_age_that_is_allowed() -> None:
    buffer = Buffer(1, 4)
    buffer.ask([prompt(0), prompt(1)])
    old, new = buffer.next(2), buffer.next(4)
    assert buffer.drop_stale(6) == []
    finish(buffer, new, 4)
    assert buffer.drop_stale(7) == [0]
    assert not finish(buffer, old, 7)  # it ran on meanwhile
    assert buffer.drop_stale(8) == []
    assert [p.id for p in buffer.given_back(5)] == ["0"] and buffer.given_back(5) == []
    assert buffer.num_complete == 1 and len(buffer) == 1


def test_a_group_without_tokens_has_no_age() -> None:
    buffer = Buffer(1, 0)
    buffer.ask([prompt(0), prompt(1)])
    begun, waiting = drain(buffer, 2)
    buffer.put_back(waiting)
    stop(buffer, begun, 2)
    buffer.line_up()
    assert buffer.drop_stale(3) == [0]
    assert [d.prompt.id for d in drain(buffer, 3)] == ["1"]


class World:
    """A buffer, and what should be in it."""

    def __init__(self, num_samples: int, max_age: int) -> None:
        self.num_samples, self.max_age, self.version, self.asked = num_samples, max_age, 0, 0
        self.buffer, self.running = Buffer(num_samples, max_age), []
        self.used: Counter[str] = Counter()
        self.carried = 0.0

    def act(self, what: str, which: int) -> None:
        buffer = self.buffer
        if what == "ask":
            again = buffer.given_back(which % 3)
            buffer.ask([*again, prompt(self.asked)])
            self.asked += 1
        elif what == "run" and (draft := buffer.next(self.version)) is not None:
            self.running.append(draft)
        elif what in ("finish", "stop") and self.running:
            draft = self.running.pop(which % len(self.running))
            (finish if what == "finish" else stop)(buffer, draft, self.version)
        elif what == "publish":
            self.version += 1
            dropped = buffer.drop_stale(self.version)
            self.running = [draft for draft in self.running if draft.number not in dropped]
        elif what == "take" and buffer.num_complete:
            self.take(1 + which % buffer.num_complete)
        elif what == "end":
            self.end(carries=which % 2 == 0)

    def take(self, count: int) -> None:
        self.buffer.drop_stale(self.version)
        count = min(count, self.buffer.num_complete)
        for group in self.buffer.take(count):
            samples = group.scored().samples
            assert [sample.index for sample in samples] == list(range(self.num_samples))
            oldest = min(span.weight_version for sample in samples for span in sample.spans)
            assert self.version - oldest <= self.max_age
            self.used[group.prompt.id] += 1

    def end(self, *, carries: bool) -> None:
        for draft in self.running:
            self.buffer.put_back(draft)
        self.running = []
        self.buffer.line_up()
        if not carries:
            self.buffer.drop_unused()

    def check(self) -> None:
        counts = self.buffer.take_counts()
        came = self.carried + counts["rollout/asked"]
        self.carried = counts["rollout/carried"]
        assert came == counts["rollout/used"] + counts["rollout/dropped"] + self.carried
        inside = [group.prompt.id for group in self.buffer.state()[0]]
        # Every question drawn has been used once, or is still there once.
        assert sorted([*self.used.elements(), *inside], key=int) == [str(n) for n in range(self.asked)]


ACTIONS = st.tuples(
    st.sampled_from(["ask", "run", "run", "run", "finish", "finish", "stop", "publish", "take", "end"]),
    st.integers(0, 50),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.lists(ACTIONS, max_size=120))
def test_nothing_is_lost_or_doubled(num_samples: int, max_age: int, actions: list[tuple[str, int]]) -> None:
    world = World(num_samples, max_age)
    for what, which in actions:
        world.act(what, which)
        world.check()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.lists(ACTIONS, max_size=80))
def test_a_restored_buffer_holds_the_same(num_samples: int, actions: list[tuple[str, int]]) -> None:
    world = World(num_samples, 1)
    for what, which in actions:
        world.act(what, which)
    world.end(carries=True)
    groups, scores = world.buffer.state()
    other = Buffer(num_samples, 1)
    other.restore(groups, scores)
    assert other.num_complete == world.buffer.num_complete
    # What was never begun is asked as if anew.
    begun = [group for group in groups if group.samples]
    again = [group for group in groups if not group.samples]
    found = other.state()[0]
    assert found == [*again, *begun]
