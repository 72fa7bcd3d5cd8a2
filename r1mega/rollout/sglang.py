"""SGLang servers behind the interface of an engine: every sequence asked for comes back once, whatever servers do.

Sequences are requests of their own, each sent to the server that holds the fewest. A server that breaks off is left out
until it answers again with the right weights, and what it held is asked for again: a sequence counts when its whole
answer is here, so none is lost and none is there twice. Who restarts servers is launch/engines.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from r1mega.rollout.client import Answer, EngineClient
from r1mega.types import Completion, EngineRefused, EngineUnavailable, FinishReason, Request, SamplingParams

T = TypeVar("T")
# A connection for each call: measured 260 short requests a second, and 66 over connections that are kept.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
_POLL_SECONDS = 0.5
_ATTEMPTS = 10  # of one sequence, before it is held to be what makes servers fail
_FAILURES = 3  # of a server, one after the other: a connection may break off, and the server be well


class EnginesLost(RuntimeError):
    """No server has answered for too long, or a sequence makes every server fail."""


@dataclass
class _Server:
    """What is known of one server."""

    client: EngineClient
    held: int = 0  # requests it has not answered
    failures: int = 0  # since it last answered
    is_up: bool = True
    why_not: str = ""


@dataclass(frozen=True)
class _Job:
    position: int
    key: int
    index: int
    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass
class _Fleet:
    """The servers during one call."""

    servers: list[_Server]
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    last_up: float = field(default_factory=time.monotonic)
    revivals: set[asyncio.Task[None]] = field(default_factory=set)


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
        self._version = -1
        self._directory: str | None = None

    @property
    def weight_version(self) -> int:
        """The version of the weights that the servers were last given; -1 before."""
        return self._version

    def wait_until_ready(self) -> None:
        """Return when every server answers. Raises EnginesLost where one does not within the patience."""

        async def wait(fleet: _Fleet) -> None:
            limit = time.monotonic() + self._patience
            for server in fleet.servers:
                while not await server.client.is_healthy():
                    if time.monotonic() > limit:
                        raise EnginesLost(
                            f"{server.client.url}: no answer within {self._patience:g} s (run.timeout_minutes)"
                        )
                    await asyncio.sleep(_POLL_SECONDS)

        self._run(wait)

    def load_from_disk(self, directory: str, version: int) -> None:
        """Make every server load a checkpoint directory. A server that restarts meanwhile is waited for.

        Raises EnginesLost where one is not there within the patience, EngineRefused where one cannot load it.
        """
        self._version, self._directory = version, directory

        async def load(fleet: _Fleet) -> None:
            await asyncio.gather(*(self._bring_up_to_date(server, again=True) for server in fleet.servers))

        self._run(load)

    def begin_update(self) -> None:
        """Wait until every server answers, and make it ready for weights in several calls.

        Raises EnginesLost, EngineRefused and EngineUnavailable, as the two that follow; the servers then hold parts of
        what was published.
        """
        self.wait_until_ready()
        self._directory = None
        self._each(lambda client, _: client.begin_update(self._patience))

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over tensors: payloads[server][rank]."""
        self._each(lambda client, server: client.update_from_tensors(payloads[server], self._patience))

    def end_update(self, version: int) -> None:
        """Serve all that was handed over, under this version."""
        self._each(lambda client, _: client.end_update(str(version), self._patience))
        self._version = version

    def checksums(self) -> list[dict[str, Any]]:
        """What each server says of the hashes of its parameters. Raises EnginesLost, EngineRefused."""
        found: list[dict[str, Any]] = []

        async def of(server: _Server) -> dict[str, Any]:
            for _ in range(_ATTEMPTS):
                try:
                    return await server.client.checksums(self._patience)
                except EngineUnavailable as error:
                    server.why_not = str(error)
                    await self._bring_up_to_date(server)
            raise EnginesLost(f"asked {_ATTEMPTS} times in vain, last: {server.why_not}")

        async def ask(fleet: _Fleet) -> None:
            found.extend(await asyncio.gather(*map(of, fleet.servers)))

        self._run(ask)
        return found

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

        async def work(fleet: _Fleet) -> None:
            for job in jobs:  # shared by all: each takes the next one
                answer = await self._answer(
                    fleet, lambda client, job=job: client.generate(job.token_ids, params, job.max_tokens)
                )
                completion = Completion(
                    job.key, job.index, answer.token_ids, answer.logprobs, answer.finish_reason, self._version
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

        async def work(fleet: _Fleet) -> None:
            for i in numbers:
                results[i] = await self._ask(fleet, lambda client, i=i: client.prompt_logprobs(sequences[i]))

        self._run_many(work, len(sequences))
        return results

    async def _answer(self, fleet: _Fleet, call: Callable[[EngineClient], Awaitable[Answer]]) -> Answer:
        """A whole answer by the weights that are due."""

        async def checked(client: EngineClient) -> Answer:
            answer = await call(client)
            if answer.weight_version != str(self._version):
                raise EngineUnavailable(f"{client.url}: serves weights {answer.weight_version}, not {self._version}")
            if answer.finish_reason is FinishReason.abort:
                raise EngineUnavailable(f"{client.url}: broke the sequence off")
            return answer

        return await self._ask(fleet, checked)

    async def _ask(self, fleet: _Fleet, call: Callable[[EngineClient], Awaitable[T]]) -> T:
        """The result of `call` by whichever server gives one."""
        errors: list[str] = []
        while len(errors) < _ATTEMPTS:
            server = await self._least_loaded(fleet)
            server.held += 1
            try:
                found = await call(server.client)
            except EngineUnavailable as error:
                errors.append(str(error))
                server.failures += 1
                if server.failures >= _FAILURES:
                    self._leave_out(fleet, server, str(error))
            else:
                server.failures = 0
                fleet.last_up = time.monotonic()
                return found
            finally:
                server.held -= 1
        raise EnginesLost(f"a sequence was asked for {_ATTEMPTS} times in vain, last: {errors[-1]}")

    async def _least_loaded(self, fleet: _Fleet) -> _Server:
        """The server that holds the fewest requests, once there is one that answers."""
        async with fleet.changed:
            while True:
                up = [server for server in fleet.servers if server.is_up]
                if up:
                    return min(up, key=lambda server: server.held)
                if time.monotonic() - fleet.last_up > self._patience:
                    reasons = "; ".join(server.why_not for server in fleet.servers)
                    raise EnginesLost(
                        f"no server has answered for {self._patience:g} s (run.timeout_minutes): {reasons}"
                    )
                try:
                    await asyncio.wait_for(fleet.changed.wait(), _POLL_SECONDS)
                except TimeoutError:
                    continue

    def _leave_out(self, fleet: _Fleet, server: _Server, reason: str) -> None:
        if not server.is_up:
            return
        server.is_up, server.why_not = False, reason
        print(f"engine left out until it serves weights {self._version}: {reason}", file=sys.stderr)
        task = asyncio.create_task(self._revive(fleet, server))
        fleet.revivals.add(task)
        task.add_done_callback(fleet.revivals.discard)

    async def _revive(self, fleet: _Fleet, server: _Server) -> None:
        """Take a server in again when it serves the right weights."""
        try:
            await self._bring_up_to_date(server)
        except (EnginesLost, EngineRefused) as error:
            server.why_not += f", then {error}"  # the others go on; where there are none, their patience ends
            print(f"engine stays left out: {error}", file=sys.stderr)
            return
        async with fleet.changed:
            server.is_up, server.why_not, server.failures = True, "", 0
            fleet.changed.notify_all()
        print(f"engine is back: {server.client.url}", file=sys.stderr)

    async def _bring_up_to_date(self, server: _Server, *, again: bool = False) -> None:
        """Wait until the server answers, and give it the weights that are due: where it has others, or in any case."""
        limit = time.monotonic() + self._patience
        reason = "no answer"
        while time.monotonic() < limit:
            try:
                if await server.client.is_healthy():
                    if not again and await server.client.weight_version() == str(self._version):
                        return
                    if self._directory is None:
                        raise EngineRefused(f"{server.client.url}: no weights have been published yet")
                    await server.client.load_from_disk(self._directory, str(self._version), self._patience)
                    return
            except EngineUnavailable as error:
                reason = str(error)
            await asyncio.sleep(_POLL_SECONDS)
        raise EnginesLost(f"{server.client.url}: does not serve weights {self._version}: {reason}")

    def _run_many(self, work: Callable[[_Fleet], Awaitable[None]], total: int) -> None:
        """As many workers as the servers hold requests, so that memory does not grow with what is asked for."""
        workers = min(total, self._max_in_flight * len(self.urls))

        async def all_of(fleet: _Fleet) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work(fleet))

        self._run(all_of)

    def _each(self, call: Callable[[EngineClient, int], Awaitable[None]]) -> None:
        """A call to every server at once."""

        async def all_of(fleet: _Fleet) -> None:
            await asyncio.gather(*(call(server.client, i) for i, server in enumerate(fleet.servers)))

        self._run(all_of)

    def _run(self, what: Callable[[_Fleet], Awaitable[None]]) -> None:
        async def run() -> None:
            async with self._fleet() as fleet:
                await what(fleet)

        try:
            asyncio.run(run())
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    @asynccontextmanager
    async def _fleet(self):
        async with httpx.AsyncClient(limits=LIMITS, transport=self._transport, trust_env=False) as http:
            fleet = _Fleet([_Server(EngineClient(url, http)) for url in self.urls])
            try:
                yield fleet
            finally:
                for task in list(fleet.revivals):
                    task.cancel()
                await asyncio.gather(*fleet.revivals, return_exceptions=True)


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
