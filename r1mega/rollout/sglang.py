"""SGLang servers behind the interface of an engine: every sequence asked for comes back once, whatever servers do.

Sequences are requests of their own. What a server that broke off held is asked for again: a sequence counts when its
whole answer is here, so none is lost and none is there twice.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from r1mega.parallel.seed import derive
from r1mega.rollout.client import HEALTH_SECONDS, EngineClient
from r1mega.rollout.server_pool import ATTEMPTS, DueWeights, EnginesLost, Server, ServerPool
from r1mega.types import (
    Completion,
    EngineRefused,
    EngineUnavailable,
    GroupAddress,
    Request,
    SamplingParams,
    TensorShape,
)

if TYPE_CHECKING:
    from r1mega.models.expert_choices import ExpertChoices

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    position: int
    key: int
    index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    seed: int | None


class SglangEngines:
    """`r1mega.types.Engine` of several servers, but for `load`: weights reach servers as weights/ publishes them.

    All calls to servers are made in a thread of its own, which begins with the first of them and ends with `close` or
    the process.

    Args:
        urls: one of each server.
        max_in_flight: requests that one server holds at most.
        patience_seconds: how long no server at all may answer before EnginesLost.
        choices: the shape of the model's choices of experts; needed where sampling asks for them.
        transport: how calls travel; None: over TCP.
        router_url: of a router before the servers, which sequences are asked of; all else goes to the servers.
        directory_of: where a version that was handed over will also stand on a disk, where it will.
        overlaps: whether sequences may be generated while weights are published. The servers are then paused from the
            begin of a publish until `go_on`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_in_flight: int,
        patience_seconds: float,
        choices: ExpertChoices | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        router_url: str | None = None,
        directory_of: Callable[[int], Path] | None = None,
        overlaps: bool = False,
    ) -> None:
        self.urls = list(urls)
        self.most_in_flight = max_in_flight * len(self.urls)
        self._patience, self._transport, self._overlaps = patience_seconds, transport, overlaps
        self._router_url, self._directory_of = router_url, directory_of
        self.choices = choices
        self._due = DueWeights()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pool: ServerPool | None = None
        self._closing = asyncio.Event()

    @property
    def weight_version(self) -> int:
        """The version of the weights that the servers were last given; -1 before."""
        return self._due.version

    def close(self) -> None:
        """End what is asked of the servers. Nothing can be asked of them afterwards."""
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._loop = None

    def wait_until_ready(self) -> None:
        """Return when every server answers. Raises EnginesLost where one does not within the patience."""
        self.run(lambda pool: pool.wait_until_ready())

    def load_from_disk(self, directory: str, version: int) -> None:
        """Make every server load a checkpoint directory. A server that restarts meanwhile is waited for.

        Raises EnginesLost where one is not there within the patience, EngineRefused where one cannot load it.
        """
        self._due = DueWeights(version, directory)

        async def load(pool: ServerPool) -> None:
            await asyncio.gather(*(pool.bring_up_to_date(server, again=True) for server in pool.servers))
            pool.floor = version

        self.run(load)

    def started_from_disk(self, directory: str, version: int) -> None:
        """The servers load a checkpoint directory as they start. Waits until all of them have.

        Raises EnginesLost where one is not there within the patience.
        """
        self._due = DueWeights(version, directory)

        async def wait(pool: ServerPool) -> None:
            await pool.wait_until_ready()
            pool.floor = version

        self.run(wait)

    def begin_update(self) -> None:
        """Wait until every server answers, and make it ready for weights in several calls.

        Raises EnginesLost, EngineRefused and EngineUnavailable, as the two that follow; the servers then hold parts of
        what was published.
        """
        self.wait_until_ready()
        self._due = DueWeights(self._due.version)
        self.run(lambda pool: pool.pause())
        self.run(lambda pool: pool.each(lambda client, _: client.begin_update(self._patience)))

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over tensors: payloads[server][rank]."""
        self.run(lambda pool: pool.each(lambda client, i: client.update_from_tensors(payloads[i], self._patience)))

    def weight_versions(self) -> list[str]:
        """What each server calls the weights that it serves."""
        return self.run(lambda pool: pool.each(lambda client, _: client.weight_version()))

    def join_group(self, address: GroupAddress, first_ranks: Sequence[int]) -> None:
        """Make every server join a process group, from its own first rank on; returns when all are there."""
        self.run(lambda pool: pool.each(lambda client, i: client.join_group(address, first_ranks[i], self._patience)))

    def leave_groups(self, names: Sequence[str]) -> None:
        """Make every server leave groups, where it answers and is in them; of one that does not answer it is told."""

        async def leave(client: EngineClient, _: int) -> None:
            for name in names:
                try:
                    await client.leave_group(name, HEALTH_SECONDS)
                except EngineRefused:
                    continue  # started again since, it is in none
                except EngineUnavailable as error:
                    print(f"engine did not leave its groups: {error}", file=sys.stderr)
                    return

        self.run(lambda pool: pool.each(leave))

    def update_from_group(self, name: str, tensors: Sequence[TensorShape]) -> None:
        """Load tensors that rank 0 of the group broadcasts in one piece; returns when every server has."""
        self.run(lambda pool: pool.each(lambda client, _: client.update_from_group(name, tensors, self._patience)))

    def end_update(self, version: int) -> None:
        """Serve all that was handed over, under this version."""
        directory = str(self._directory_of(version)) if self._directory_of else None
        due = DueWeights(version, directory, is_coming=True)

        async def end(pool: ServerPool) -> None:
            await pool.each(lambda client, _: client.end_update(str(version), self._patience, is_paused=self._overlaps))
            pool.due, pool.floor = due, version

        self.run(end)
        self._due = due

    def go_on(self) -> None:
        """What was published has been found right: sequences that it interrupted go on under it."""
        self.run(lambda pool: pool.resume())

    def checksums(self) -> list[dict[str, Any]]:
        """What each server says of the hashes of its parameters. Raises EnginesLost, EngineRefused."""
        return self._of_each(lambda client: client.checksums(self._patience))

    def logprobs_of_each(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """`logprobs` of every server by itself: [server][sequence]. Raises EnginesLost, EngineRefused."""

        async def ask(client: EngineClient) -> list[list[float]]:
            return [await client.prompt_logprobs(sequence) for sequence in sequences]

        return self._of_each(ask)

    def each(self, call: Callable[[EngineClient, int], Awaitable[T]]) -> list[T]:
        """A call to every server at once, with its number; what they gave, in order."""
        return self.run(lambda pool: pool.each(call))

    def _of_each(self, call: Callable[[EngineClient], Awaitable[T]]) -> list[T]:
        """What every server gives by the weights that are due; one that fails is asked again when it has them."""

        async def of(pool: ServerPool, server: Server) -> T:
            for _ in range(ATTEMPTS):
                try:
                    return await call(server.client)
                except EngineUnavailable as error:
                    server.why_not = str(error)
                    await pool.bring_up_to_date(server)
            raise EnginesLost(f"asked {ATTEMPTS} times in vain, last: {server.why_not}")

        async def ask(pool: ServerPool) -> list[T]:
            return list(await asyncio.gather(*(of(pool, server) for server in pool.servers)))

        return self.run(ask)

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
        choices = self.choices if params.routed_experts else None
        assert not params.routed_experts or choices is not None, "experts asked for of a model whose shape is not known"

        async def work(pool: ServerPool) -> None:
            for job in jobs:  # shared by all: each takes the next one
                answer = await pool.answer(
                    lambda client, job=job: client.generate(
                        job.token_ids, params, job.max_tokens, choices, seed=job.seed
                    )
                )
                completion = answer.completion(job.key, job.index)
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
        workers = min(total, self.most_in_flight)

        async def all_of(pool: ServerPool) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work(pool))

        self.run(all_of)

    def run(self, what: Callable[[ServerPool], Awaitable[T]]) -> T:
        """What comes of a call with the servers, made in their thread; this one waits for it."""
        if self._loop is None:
            self._begin()
        assert self._loop is not None

        async def run() -> T:
            assert self._pool is not None
            self._pool.due = self._due
            self._pool.try_again()
            return await what(self._pool)

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        finally:
            future.cancel()  # where it was this thread that was interrupted

    def _begin(self) -> None:
        assert self._thread is None, "the servers' thread has been closed"
        is_ready = threading.Event()

        async def keep() -> None:
            async with ServerPool(
                self.urls, self._patience, self._transport, self._router_url, pauses=self._overlaps
            ) as self._pool:
                self._loop = asyncio.get_running_loop()
                is_ready.set()
                await self._closing.wait()

        # Not waited for at the end of the process: who never closes it has lost interest in what it does.
        self._thread = threading.Thread(target=asyncio.run, args=(keep(),), name="engines", daemon=True)
        self._thread.start()
        is_ready.wait()


def _jobs(requests: Sequence[Request], max_tokens: int) -> Iterator[_Job]:
    for position, request in enumerate(requests):
        for index in range(request.num_samples):
            seed = None if request.seed is None else derive(request.seed, index)
            yield _Job(position, request.key, index, request.token_ids, max_tokens, seed)


def _first(errors: BaseExceptionGroup) -> BaseException:
    """One of what several workers met, as each of them says the same."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
