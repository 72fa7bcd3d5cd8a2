"""What was asked of the engines and has not been trained on: complete groups, and groups that miss sequences.

Plain bookkeeping without threads, clocks or servers. A sequence that was asked for is in one place at a time: waiting,
running, finished, or gone with its group, which is handed out (used) or dropped. The prompts of dropped groups are
asked again first, so that nothing of the data order is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from r1mega.types import Completion, FinishReason, Prompt, Sample, SampleGroup, Score


@dataclass
class Draft:
    """One sequence to generate. `so_far` is what there is of it, where it was begun before."""

    number: int  # of its group
    index: int
    prompt: Prompt
    so_far: Completion | None = None


@dataclass
class Group:
    """A question that was asked, and what there is of its answers."""

    number: int  # in the order of asking
    prompt: Prompt
    waiting: dict[int, Completion | None]  # by index: neither finished nor running, and what there is of them
    running: set[int] = field(default_factory=set)
    finished: dict[int, tuple[Sample, Future[Score] | None]] = field(default_factory=dict)
    oldest: int | None = None  # version of the weights that its oldest token may be of

    @property
    def is_complete(self) -> bool:
        """Whether every sequence is finished."""
        return not self.waiting and not self.running

    @property
    def num_samples(self) -> int:
        """Sequences that were asked for."""
        return len(self.waiting) + len(self.running) + len(self.finished)

    def scored(self) -> SampleGroup:
        """The finished samples. Waits for scores that are still to come; each has a limit of time of its own."""
        samples = []
        for _, (sample, score) in sorted(self.finished.items()):
            if score is not None:
                sample.score = score.result()
            samples.append(sample)
        return SampleGroup(self.prompt, samples)


@dataclass
class Counts:
    """Sequences since the last `take_counts`: asked for anew, handed out, given up."""

    asked: int = 0
    used: int = 0
    dropped: int = 0


class Buffer:
    """Groups between the prompt source and the trainer.

    Args:
        num_samples: sequences of a group.
        max_age: how far the weights of a group's oldest token may be behind those it is handed out under, in versions;
            versions are counts of updates.
    """

    def __init__(self, num_samples: int, max_age: int) -> None:
        self._num_samples, self._max_age = num_samples, max_age
        self._groups: dict[int, Group] = {}  # in the order of asking
        self._line: deque[tuple[int, int]] = deque()  # what waits to run, in that order
        self._complete: list[int] = []  # in the order of completion
        self._again: deque[Prompt] = deque()
        self._next_number = 0
        self._counts = Counts()

    def __len__(self) -> int:
        """Groups, complete or not."""
        return len(self._groups)

    @property
    def num_complete(self) -> int:
        """Groups that could be handed out."""
        return len(self._complete)

    @property
    def num_sequences(self) -> int:
        """Sequences of all groups, in whatever state."""
        return sum(group.num_samples for group in self._groups.values())

    def given_back(self, count: int) -> list[Prompt]:
        """Up to so many prompts of dropped groups, which the caller asks again."""
        return [self._again.popleft() for _ in range(min(count, len(self._again)))]

    def ask(self, prompts: Sequence[Prompt]) -> None:
        """Begin a group for each prompt."""
        for prompt in prompts:
            self._add(Group(self._next_number, prompt, dict.fromkeys(range(self._num_samples))))
            self._counts.asked += self._num_samples

    def next(self, version: int) -> Draft | None:
        """The sequence to run next, under weights of this version or newer; None where none waits. Older groups
        first."""
        while self._line:
            number, index = self._line.popleft()
            group = self._groups.get(number)
            if group is None or index not in group.waiting:
                continue
            so_far = group.waiting.pop(index)
            group.running.add(index)
            group.oldest = version if group.oldest is None else min(group.oldest, version)
            return Draft(number, index, group.prompt, so_far)
        return None

    def finish(self, draft: Draft, sample: Sample, score: Future[Score] | None) -> bool:
        """A sequence has ended. False where its group has been dropped meanwhile."""
        group = self._groups.get(draft.number)
        if group is None:
            return False
        group.running.remove(draft.index)
        group.finished[draft.index] = sample, score
        if group.is_complete:
            self._complete.append(group.number)
        return True

    def put_back(self, draft: Draft) -> None:
        """A sequence has been broken off: `draft.so_far` is what there is of it. It waits, behind all others."""
        group = self._groups.get(draft.number)
        if group is not None:
            group.running.remove(draft.index)
            group.waiting[draft.index] = draft.so_far
            self._line.append((draft.number, draft.index))

    def drop_stale(self, version: int) -> list[int]:
        """Give up the groups too old to be handed out under this version; returns their numbers, also of groups that
        still run."""
        limit = version - self._max_age
        stale = [n for n, group in self._groups.items() if group.oldest is not None and group.oldest < limit]
        self._drop(stale)
        return stale

    def drop_unused(self) -> None:
        """Give up all that is left; nothing may be running."""
        self._drop(list(self._groups))

    def line_up(self) -> None:
        """Let what waits run in the order of asking again, after all that ran has been put back."""
        self._line = deque((n, index) for n, group in self._groups.items() for index in sorted(group.waiting))
        for group in self._groups.values():
            assert not group.running, "a group still runs"
            group.oldest = _oldest(group)

    def take(self, count: int) -> list[Group]:
        """So many complete groups: those of the oldest weights first, else those that were complete first; in the
        order of asking. They are used."""
        assert count <= len(self._complete), "so many groups are not complete"
        place = {number: i for i, number in enumerate(self._complete)}
        chosen = sorted(self._complete, key=lambda number: (self._groups[number].oldest or 0, place[number]))[:count]
        self._complete = [number for number in self._complete if number not in set(chosen)]
        groups = [self._groups.pop(number) for number in sorted(chosen)]
        self._counts.used += sum(group.num_samples for group in groups)
        return groups

    def take_counts(self) -> dict[str, float]:
        """Metrics since the last call. What was carried before, and asked, is what is used, dropped or carried now."""
        counts, self._counts = self._counts, Counts()
        return {
            "rollout/asked": float(counts.asked),
            "rollout/used": float(counts.used),
            "rollout/dropped": float(counts.dropped),
            "rollout/carried": float(self.num_sequences),
            "rollout/carried_finished": float(sum(len(group.finished) for group in self._groups.values())),
        }

    def state(self) -> tuple[list[SampleGroup], list[Future[Score] | None]]:
        """All groups as they could be begun again, and the scores still to come of their finished samples, in order.

        A sample that is not finished has finish_reason abort; what of a running one is not here yet is left out. The
        prompts of dropped groups are groups without samples.
        """
        groups = [SampleGroup(prompt, []) for prompt in self._again]
        scores: list[Future[Score] | None] = []
        for group in self._groups.values():
            samples = [sample for _, (sample, _) in sorted(group.finished.items())]
            scores += [score for _, (_, score) in sorted(group.finished.items())]
            begun = [(index, piece) for index, piece in sorted(group.waiting.items()) if piece is not None]
            samples += [sample_of(group.prompt, index, piece, "") for index, piece in begun]
            groups.append(SampleGroup(group.prompt, samples))
        return groups, scores

    def restore(self, groups: Sequence[SampleGroup], scores: Sequence[Future[Score] | None]) -> None:
        """Go on with the groups of `state`; a score that is None stands in the sample."""
        assert not self._groups, "the buffer is not empty"
        remaining = iter(scores)
        for found in groups:
            if not found.samples:
                self._again.append(found.prompt)
                continue
            group = Group(self._next_number, found.prompt, dict.fromkeys(range(self._num_samples)))
            for sample in found.samples:
                if sample.finish_reason is FinishReason.abort:
                    group.waiting[sample.index] = piece_of(sample)
                else:
                    del group.waiting[sample.index]
                    group.finished[sample.index] = sample, next(remaining)
            group.oldest = _oldest(group)
            self._add(group)

    def _add(self, group: Group) -> None:
        self._next_number += 1
        self._groups[group.number] = group
        self._line.extend((group.number, index) for index in group.waiting)
        if group.is_complete:
            self._complete.append(group.number)

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            group = self._groups.pop(number)
            self._counts.dropped += group.num_samples
            self._again.append(group.prompt)
        self._complete = [number for number in self._complete if number in self._groups]


def _oldest(group: Group) -> int | None:
    """The version of its oldest token."""
    pieces = [piece for piece in group.waiting.values() if piece is not None]
    found = [*pieces, *(sample for sample, _ in group.finished.values())]
    return min((span.weight_version for piece in found for span in piece.spans), default=None)


def sample_of(prompt: Prompt, index: int, sequence: Completion, text: str) -> Sample:
    """A sequence as the trainer has it."""
    return Sample(
        prompt_id=prompt.id,
        index=index,
        token_ids=sequence.token_ids,
        loss_mask=[1] * len(sequence.token_ids),
        rollout_logprobs=sequence.logprobs,
        finish_reason=sequence.finish_reason,
        weight_version=sequence.weight_version,
        text=text,
        spans=sequence.spans,
        routed_experts=sequence.routed_experts,
    )


def piece_of(sample: Sample) -> Completion | None:
    """What `sample_of` was made of; None where it has no token."""
    if not sample.token_ids:
        return None
    return Completion(
        0,
        sample.index,
        sample.token_ids,
        sample.rollout_logprobs,
        sample.finish_reason,
        sample.weight_version,
        sample.spans,
        sample.routed_experts,
    )
