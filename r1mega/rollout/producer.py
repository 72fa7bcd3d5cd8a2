"""Keeps SGLang servers at work on the questions of a buffer, in the thread of the servers' calls.

A round asks for more questions than it uses (`wanted`), takes as many groups as it needs when they are complete, and
then either stops the rest, or lets it run on while the trainer trains. Which groups are used is decided by which are
complete first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from r1mega.rollout.buffer import Buffer, Draft, Group, sample_of
from r1mega.rollout.client import Answer, EngineClient
from r1mega.rollout.pieces import cut, end_at_stop, join, without_unchecked
from r1mega.rollout.server_pool import ATTEMPTS, EnginesLost, ServerPool
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import (
    Completion,
    EngineUnavailable,
    FinishReason,
    Prompt,
    SampleGroup,
    SamplingParams,
    Score,
)

# A server that does not answer an abort within this is not waited for: what it held since it was last asked is lost.
STOP_SECONDS = 30.0
_ABORT_SECONDS = 0.2  # between aborts: one that comes before the request it is meant for ends nothing


class Prompts(Protocol):
    """Questions in an order that can be resumed."""

    def next(self, count: int) -> list[Prompt]:
        """The next so many."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""


@dataclass(frozen=True)
class Demand:
    """How much is asked for.

    `wanted` questions are in the works while a round waits. With `ahead` 0 what a round does not use is stopped at its
    end, and given up or, with `carries`, continued in the next one. Otherwise `ahead` x `wanted` questions are in the
    works all the time, and nothing is stopped.
    """

    wanted: int
    ahead: int = 0
    carries: bool = False


class Producer:
    """Fills a buffer and empties it round by round.

    Args:
        unchecked: tokens of one decoding step, see pieces.without_unchecked.

    Its methods are called by one thread, which is not that of the servers. They raise EnginesLost and EngineRefused;
    what goes wrong between two rounds is raised by the next.
    """

    def __init__(
        self,
        engines: SglangEngines,
        buffer: Buffer,
        prompts: Prompts,
        demand: Demand,
        decode: Callable[[Sequence[int]], str],
        scorer: Callable[[Prompt, str], Future[Score]],
        unchecked: int = 1,
    ) -> None:
        self._engines, self._buffer, self._prompts, self._demand = engines, buffer, prompts, demand
        self._decode, self._scorer, self._unchecked = decode, scorer, unchecked
        self._params = SamplingParams()
        self._running: dict[asyncio.Task[None], Draft] = {}
        self._stopping = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def round(
        self, count: int, params: SamplingParams, version: int, *, is_last: bool = False
    ) -> tuple[list[Group], dict[str, float]]:
        """The next `count` groups, of weights at most as old as the buffer allows; and what became of all.

        `version` is what the servers serve. After the last round nothing more is asked for.
        """
        self._params = params

        async def work(pool: ServerPool) -> tuple[list[Group], dict[str, float]]:
            for number in self._buffer.drop_stale(version):
                self._cancel(number)
            self._top_up(self._demand.wanted * max(1, self._demand.ahead))
            self._go_on(pool)
            while self._buffer.num_complete < count:
                await self._wait()
            if self._demand.ahead == 0:
                await self._stop(pool)
            groups = self._buffer.take(count)
            if self._demand.ahead == 0:
                self._buffer.line_up()
                if not self._demand.carries:
                    self._buffer.drop_unused()
            elif not is_last:
                self._top_up(self._demand.wanted * self._demand.ahead)
                self._go_on(pool)
            return groups, self._buffer.take_counts()

        return self._engines.run(work)

    def snapshot(self) -> tuple[dict[str, Any], list[SampleGroup]]:
        """Where the prompts stand, and the groups in the works, both at one moment: see Buffer.state."""

        async def look(_pool: ServerPool) -> tuple[Any, Any]:
            return self._prompts.state_dict(), self._buffer.state()

        cursor, (groups, scores) = self._engines.run(look)
        finished = [s for group in groups for s in group.samples if s.finish_reason is not FinishReason.abort]
        for sample, score in zip(finished, scores, strict=True):
            if score is not None:
                sample.score = score.result()
        return cursor, groups

    def restore(self, groups: Sequence[SampleGroup]) -> None:
        """Go on with the groups of a snapshot, whose samples may be without text."""
        scores: list[Future[Score] | None] = []
        for group in groups:
            for sample in group.samples:
                if sample.finish_reason is not FinishReason.abort:
                    sample.text = self._decode(sample.token_ids)
                    scores.append(self._scorer(group.prompt, sample.text) if sample.score is None else None)
        self._buffer.restore(groups, scores)

    def close(self) -> None:
        """End what runs, and all calls to the servers."""
        self._stopping = True
        self._engines.close()

    def _top_up(self, groups: int) -> None:
        """Ask for questions until so many groups are in the works; first those that were given up before."""
        missing = max(0, groups - len(self._buffer))
        again = self._buffer.given_back(missing)
        self._buffer.ask([*again, *self._prompts.next(missing - len(again))])

    def _go_on(self, pool: ServerPool) -> None:
        """Begin what waits, as far as the servers hold it."""
        while not self._stopping and self._failure is None and len(self._running) < self._engines.most_in_flight:
            draft = self._buffer.next(pool.floor)
            if draft is None:
                return
            task = asyncio.create_task(self._sequence(pool, draft))
            self._running[task] = draft
            task.add_done_callback(lambda done: self._ended(pool, done))

    def _ended(self, pool: ServerPool, task: asyncio.Task[None]) -> None:
        draft = self._running.pop(task)
        if task.cancelled():
            self._buffer.put_back(draft)
        elif (error := task.exception()) is not None and self._failure is None:
            self._failure = error
        self._changed.set()
        self._go_on(pool)

    async def _wait(self) -> None:
        """Until something has changed. Raises what has gone wrong."""
        if self._failure is not None:
            raise self._failure
        assert self._running, "a round waits for groups, and nothing runs"
        await self._changed.wait()
        self._changed.clear()
        if self._failure is not None:
            raise self._failure

    def _cancel(self, number: int) -> None:
        """Break off what runs of a group that has been dropped. SGLang ends a request whose connection is closed."""
        for task, draft in self._running.items():
            if draft.number == number:
                task.cancel()

    async def _stop(self, pool: ServerPool) -> None:
        """Break off all that runs; what there is of it is put back."""
        self._stopping = True
        limit = time.monotonic() + STOP_SECONDS
        try:
            while self._running:
                if time.monotonic() > limit:
                    for task in self._running:
                        task.cancel()
                else:
                    await asyncio.gather(*(_abort(server.client) for server in pool.servers if server.is_up))
                if self._running:
                    await asyncio.wait(list(self._running), timeout=_ABORT_SECONDS)
        finally:
            self._stopping = False
        if self._failure is not None:
            raise self._failure

    async def _sequence(self, pool: ServerPool, draft: Draft) -> None:
        """Generate one sequence to its end, or until all is stopped."""
        fruitless, longest = 0, self._params.max_tokens
        if _length(draft.so_far) >= longest:  # begun when more was allowed
            assert draft.so_far is not None
            return self._deliver(draft, cut(draft.so_far, longest, FinishReason.length))
        while True:
            answer = await pool.ask(lambda client: self._ask(pool, client, draft))
            if answer is not None and self._is_of_use(answer):
                before = draft.so_far
                draft.so_far = self._joined(draft, answer)
                if draft.so_far.finish_reason is not FinishReason.abort:
                    return self._deliver(draft, draft.so_far)
                fruitless = 0 if len(draft.so_far.token_ids) > _length(before) else fruitless + 1
            if self._stopping:
                return self._buffer.put_back(draft)
            if fruitless == ATTEMPTS:
                raise EnginesLost(f"a sequence was broken off {ATTEMPTS} times by its servers, and nobody asked for it")

    def _is_of_use(self, answer: Answer) -> bool:
        """An answer that was broken off may lack the experts that the trainer is to replay."""
        return not self._params.routed_experts or answer.routed_experts is not None

    async def _ask(self, pool: ServerPool, client: EngineClient, draft: Draft) -> Answer | None:
        """What one server makes of the rest of a sequence; None where all has been stopped."""
        if self._stopping:
            return None
        done = [] if draft.so_far is None else draft.so_far.token_ids
        tokens, rest = [*draft.prompt.token_ids, *done], self._params.max_tokens - len(done)
        choices = self._engines.choices if self._params.routed_experts else None
        try:
            return await pool.checked(lambda one: one.generate(tokens, self._params, rest, choices), client)
        except EngineUnavailable:
            if self._stopping:
                return None
            raise

    def _joined(self, draft: Draft, answer: Answer) -> Completion:
        piece = answer.completion(draft.number, draft.index)
        if piece.finish_reason is FinishReason.abort:
            piece = without_unchecked(piece, self._unchecked)
        whole = join(draft.so_far, piece)
        boundary = _length(draft.so_far)
        return end_at_stop(whole, boundary, self._params.stop, self._decode) if boundary else whole

    def _deliver(self, draft: Draft, sequence: Completion) -> None:
        text = self._decode(sequence.token_ids)
        sample = sample_of(draft.prompt, draft.index, sequence, text)
        self._buffer.finish(draft, sample, self._scorer(draft.prompt, text))


def _length(sequence: Completion | None) -> int:
    return 0 if sequence is None else len(sequence.token_ids)


async def _abort(client: EngineClient) -> None:
    try:
        await client.abort_all()
    except EngineUnavailable:
        return  # what it held is found broken off by who waits for it
