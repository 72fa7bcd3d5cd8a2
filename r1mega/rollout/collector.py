"""Rollouts of one round, from prompts to complete groups on every rank.

Embedded engines live in the first `num_engines` training ranks. Each takes a share of the prompts; a sample goes to the
scorer the moment it ends, so rewards are worked out beside the generation of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch.distributed as dist

from r1mega.parallel.collectives import gather
from r1mega.parallel.seed import derive
from r1mega.types import Completion, Engine, Prompt, Request, Sample, SampleGroup, SamplingParams, Score

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
            sample = Sample(
                prompt_id=prompt.id,
                index=completion.index,
                token_ids=completion.token_ids,
                loss_mask=[1] * len(completion.token_ids),
                rollout_logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weight_version=completion.weight_version,
                text=text,
            )
            future = self._scorer(prompt, text) if score and self._scorer is not None else None
            self._pending.append(_Pending(completion.key, sample, future))

        self._engine.generate(requests, own, finished)

    def groups(self) -> list[SampleGroup]:
        """The complete groups of the last `generate`, in the order of its prompts, the same on every rank.

        Waits for the scores that are not there yet; each has its own hard limit.
        """
        done = []
        for pending in self._pending:
            if pending.score is not None:
                pending.sample.score = pending.score.result()
            done.append((pending.position, pending.sample))
        self._pending = []
        groups = [SampleGroup(prompt, []) for prompt in self._prompts]
        for part in gather(done, self._group):
            for position, sample in part:
                groups[position].samples.append(sample)
        for group in groups:
            group.samples.sort(key=lambda sample: sample.index)
        return groups
