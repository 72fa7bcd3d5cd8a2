"""Rollouts of one round, from prompts to complete groups on every rank.

Embedded engines live in the first `num_engines` training ranks. Each takes a share of the prompts; a sample goes to the
scorer the moment it ends, so rewards are worked out beside the generation of the rest.

A loop gets its groups of `Lockstep` or `Streamed` rollouts: `generate`, then `groups`, once a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from r1mega.parallel.collectives import gather, share
from r1mega.parallel.seed import derive
from r1mega.rollout.buffer import Group, sample_of
from r1mega.types import Completion, Engine, Prompt, Request, Sample, SampleGroup, SamplingParams, Score

if TYPE_CHECKING:
    from r1mega.data.mixture import MixedSource
    from r1mega.data.prompts import PromptSource
    from r1mega.rollout.producer import Producer

Scorer = Callable[[Prompt, str], "Future[Score]"]


@dataclass
class _Pending:
    """A sample whose score is still to come."""

    position: int  # of its prompt in the round
    sample: Sample
    score: Future[Score] | None


class Collector:
    """Generates on the ranks that host an engine and brings the samples together on all ranks.

    Args:
        engine: this rank's engine; None on a rank that hosts none.
        num_engines: how many ranks host one.
        decode: token ids -> the text that rewards are given.
        scorer: starts the scoring of one text; None where this rank hosts no engine.
        group: all ranks, for objects.
    """

    def __init__(
        self,
        engine: Engine | None,
        num_engines: int,
        decode: Callable[[Sequence[int]], str],
        scorer: Scorer | None,
        group: dist.ProcessGroup,
    ) -> None:
        self._engine, self._num_engines = engine, num_engines
        self._decode, self._scorer, self._group = decode, scorer, group
        self._pending: list[_Pending] = []
        self._prompts: Sequence[Prompt] = ()

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, params: SamplingParams, *, version: int, score: bool = True
    ) -> None:
        """Sample every prompt `num_samples` times; scores begin to be worked out. `groups` gives the result.

        Raises RuntimeError where an engine generates with other weights than `version`.
        """
        assert not self._pending, "the samples of the last call have not been taken"
        self._prompts = prompts
        if self._engine is None:
            return
        if self._engine.weight_version != version:
            raise RuntimeError(
                f"engine of rank {dist.get_rank()}: its weights are version {self._engine.weight_version}, the "
                f"trainer's {version}; the last publish did not reach it"
            )
        rank = dist.get_rank(self._group)
        # Dealt out in turn, so that neighbours in the file (often alike in length) do not meet on one engine.
        mine = range(rank, len(prompts), self._num_engines)
        requests = [
            Request(key=position, token_ids=prompts[position].token_ids, num_samples=num_samples) for position in mine
        ]
        own = SamplingParams(**{**vars(params), "seed": None if params.seed is None else derive(params.seed, rank)})

        def finished(completion: Completion) -> None:
            prompt = prompts[completion.key]
            text = self._decode(completion.token_ids)
            sample = sample_of(prompt, completion.index, completion, text)
            future = self._scorer(prompt, text) if score and self._scorer is not None else None
            self._pending.append(_Pending(completion.key, sample, future))

        self._engine.generate(requests, own, finished)

    def groups(self) -> list[SampleGroup]:
        """The complete groups of the last `generate`, in the order of its prompts, the same on every rank.

        But for `routed_experts`, megabytes a sample, which stay where the sample was made: train.routes deals them out.
        Waits for the scores that are not there yet; each has its own hard limit.
        """
        stay = {(pending.position, pending.sample.index): pending.sample.routed_experts for pending in self._pending}
        done = []
        for pending in self._pending:
            if pending.score is not None:
                pending.sample.score = pending.score.result()
            pending.sample.routed_experts = None
            done.append((pending.position, pending.sample))
        self._pending = []
        groups = [SampleGroup(prompt, []) for prompt in self._prompts]
        for part in gather(done, self._group):
            for position, sample in part:
                sample.routed_experts = stay.get((position, sample.index))
                groups[position].samples.append(sample)
        for group in groups:
            group.samples.sort(key=lambda sample: sample.index)
        return groups


class Lockstep:
    """Each round asks for the next questions and waits for all samples of each.

    Args:
        prompts: the same on every rank, and moved on by every rank.
    """

    def __init__(
        self, collector: Collector, prompts: PromptSource | MixedSource, questions: int, group_size: int
    ) -> None:
        self._collector, self._prompts = collector, prompts
        self._questions, self._group_size = questions, group_size

    def generate(self, params: SamplingParams, *, version: int, is_last: bool = False) -> None:
        """Sample the round's groups. Collective."""
        prompts = self._prompts.next(self._questions)
        self._collector.generate(prompts, self._group_size, params, version=version)

    def groups(self) -> list[SampleGroup]:
        """The groups of the last `generate`, scored, the same on every rank. Collective."""
        return self._collector.groups()

    def metrics(self) -> dict[str, float]:
        """What became of what was asked for, on the rank that asked: all of it is used."""
        return {}

    def snapshot(self) -> tuple[dict[str, Any], list[SampleGroup]]:
        """Where the prompts stand, and the groups that wait to be used: none."""
        return self._prompts.state_dict(), []

    def restore(self, groups: Sequence[SampleGroup]) -> None:
        """Go on with the groups of a snapshot. Raises ValueError where there are any: nothing here could use them."""
        if groups:
            raise ValueError(
                f"run.resume: the checkpoint holds {len(groups)} questions that were asked and not trained on; resume "
                "with rollout.over_sampling, rollout.carry_partial and rollout.max_staleness of the run that it is of"
            )

    def close(self) -> None:
        """Nothing is under way between two rounds."""


class Streamed:
    """Each round takes the groups that are complete first.

    Args:
        producer: on the rank that speaks to the servers, rank 0 of the group; None on the others.
        questions: groups of a round.
        group: all ranks, for objects.
    """

    def __init__(self, producer: Producer | None, questions: int, group: dist.ProcessGroup) -> None:
        self._producer, self._questions, self._group = producer, questions, group
        self._groups: list[Group] = []
        self._metrics: dict[str, float] = {}

    def generate(self, params: SamplingParams, *, version: int, is_last: bool = False) -> None:
        """Wait until the round's groups are complete; after the last one nothing more is asked for."""
        if self._producer is not None:
            self._groups, self._metrics = self._producer.round(self._questions, params, version, is_last=is_last)

    def groups(self) -> list[SampleGroup]:
        """The groups of the last `generate`, scored, the same on every rank. Collective."""
        groups, self._groups = [group.scored() for group in self._groups], []
        samples = [sample for group in groups for sample in group.samples]
        stay = [sample.routed_experts for sample in samples]  # see Collector.groups
        for sample in samples:
            sample.routed_experts = None
        shared = share(groups, self._group)
        if self._producer is not None:
            for sample, experts in zip((s for group in shared for s in group.samples), stay, strict=True):
                sample.routed_experts = experts
        return shared

    def metrics(self) -> dict[str, float]:
        """What became of what was asked for, in sequences, on the rank that asked; see Buffer.take_counts."""
        return self._metrics

    def snapshot(self) -> tuple[dict[str, Any], list[SampleGroup]]:
        """Where the prompts stand, and the groups that wait to be used; empty on ranks that ask nothing."""
        return ({}, []) if self._producer is None else self._producer.snapshot()

    def restore(self, groups: Sequence[SampleGroup]) -> None:
        """Go on with the groups of a snapshot."""
        if self._producer is not None:
            self._producer.restore(groups)

    def close(self) -> None:
        """End what is under way."""
        if self._producer is not None:
            self._producer.close()
