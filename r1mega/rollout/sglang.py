"""SGLang servers behind the interface of an engine: every sequence asked for comes back once, whatever servers do.

Sequences are requests of their own. What a server that broke off held is asked for again: a sequence counts when its
whole answer is here, so none is lost and none is there twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from r1mega.rollout.server_pool import ATTEMPTS, DueWeights, EnginesLost, Server, ServerPool
from r1mega.types import Completion, EngineUnavailable, Request, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    position: int
    key: int
    index: int
    token_ids: tuple[int, ...]
    max_tokens: int


class SglangEngines:
    """`r1mega.types.Engine` of several servers, but for `load`: weights reach servers as weights/ publishes them.

    Args:
        urls: one of each server.
        max_in_flight: requests that one server holds at most.
        patience_seconds: how long no server at all may answer before EnginesLost.
        transport: how calls travel; None: over TCP.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_in_flight: int,
        patience_seconds: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.urls = list(urls)
        self._max_in_flight, self._patience = max_in_flight, patience_seconds
        self._transport = transport
        self._due = DueWeights()

    @property
    def weight_version(self) -> int:
        """The version of the weights that the servers were last given; -1 before."""
        return self._due.version

    def wait_until_ready(self) -> None:
        """Return when every server answers. Raises EnginesLost where one does not within the patience."""
        self._run(lambda pool: pool.wait_until_ready())

    def load_from_disk(self, directory: str, version: int) -> None:
        """Make every server load a checkpoint directory. A server that restarts meanwhile is waited for.

        Raises EnginesLost where one is not there within the patience, EngineRefused where one cannot load it.
        """
        self._due = DueWeights(version, directory)

        async def load(pool: ServerPool) -> None:
            await asyncio.gather(*(pool.bring_up_to_date(server, again=True) for server in pool.servers))

        self._run(load)

    def begin_update(self) -> None:
        """Wait until every server answers, and make it ready for weights in several calls.

        Raises EnginesLost, EngineRefused and EngineUnavailable, as the two that follow; the servers then hold parts of
        what was published.
        """
        self.wait_until_ready()
        self._due = DueWeights(self._due.version)
        self._run(lambda pool: pool.each(lambda client, _: client.begin_update(self._patience)))

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over tensors: payloads[server][rank]."""
        self._run(lambda pool: pool.each(lambda client, i: client.update_from_tensors(payloads[i], self._patience)))

    def end_update(self, version: int) -> None:
        """Serve all that was handed over, under this version."""
        self._run(lambda pool: pool.each(lambda client, _: client.end_update(str(version), self._patience)))
        self._due = DueWeights(version)

    def checksums(self) -> list[dict[str, Any]]:
        """What each server says of the hashes of its parameters. Raises EnginesLost, EngineRefused."""

        async def of(pool: ServerPool, server: Server) -> dict[str, Any]:
            for _ in range(ATTEMPTS):
                try:
                    return await server.client.checksums(self._patience)
                except EngineUnavailable as error:
                    server.why_not = str(error)
                    await pool.bring_up_to_date(server)
            raise EnginesLost(f"asked {ATTEMPTS} times in vain, last: {server.why_not}")

        async def ask(pool: ServerPool) -> list[dict[str, Any]]:
            return list(await asyncio.gather(*(of(pool, server) for server in pool.servers)))

        return self._run(ask)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """All completions of all requests, ordered by (position of the request, index).

        Raises EnginesLost, and EngineRefused where a server finds fault with a request.
        """
        done: dict[tuple[int, int], Completion] = {}
        jobs = _jobs(requests, params.max_tokens)

        async def work(pool: ServerPool) -> None:
            for job in jobs:  # shared by all: each takes the next one
                answer = await pool.answer(
                    lambda client, job=job: client.generate(job.token_ids, params, job.max_tokens)
                )
                completion = Completion(
                    job.key, job.index, answer.token_ids, answer.logprobs, answer.finish_reason, self.weight_version
                )
                assert (job.position, job.index) not in done
                done[job.position, job.index] = completion
                if on_finished is not None:
                    on_finished(completion)

        total = sum(request.num_samples for request in requests)
        self._run_many(work, total)
        return [done[place] for place in sorted(done)]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1: for each sequence, the log-prob of token t+1 given tokens 0..t."""
        results: list[list[float]] = [[] for _ in sequences]
        numbers = iter([i for i, sequence in enumerate(sequences) if len(sequence) > 1])

        async def work(pool: ServerPool) -> None:
            for i in numbers:
                results[i] = await pool.ask(lambda client, i=i: client.prompt_logprobs(sequences[i]))

        self._run_many(work, len(sequences))
        return results

    def _run_many(self, work: Callable[[ServerPool], Awaitable[None]], total: int) -> None:
        """As many workers as the servers hold requests, so that memory does not grow with what is asked for."""
        workers = min(total, self._max_in_flight * len(self.urls))

        async def all_of(pool: ServerPool) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work(pool))

        self._run(all_of)

    def _run(self, what: Callable[[ServerPool], Awaitable[T]]) -> T:
        async def run() -> T:
            async with ServerPool(self.urls, self._due, self._patience, self._transport) as pool:
                return await what(pool)

        try:
            return asyncio.run(run())
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors


def _jobs(requests: Sequence[Request], max_tokens: int) -> Iterator[_Job]:
    for position, request in enumerate(requests):
        for index in range(request.num_samples):
            yield _Job(position, request.key, index, request.token_ids, max_tokens)


def _first(errors: BaseExceptionGroup) -> BaseException:
    """One of what several workers met, as each of them says the same."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
