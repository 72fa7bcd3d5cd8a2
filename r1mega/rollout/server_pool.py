"""Several SGLang servers asked as one: each call goes to the server that holds the fewest, to another where it fails.

A server that breaks off is left out until it answers again with the weights that are due. Who restarts servers is
launch/engines.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx

from r1mega.rollout.client import Answer, EngineClient
from r1mega.types import EngineRefused, EngineUnavailable, FinishReason

T = TypeVar("T")
# A connection for each call: measured 260 short requests a second, and 66 over connections that are kept.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
POLL_SECONDS = 0.5
ATTEMPTS = 10  # of one sequence, before it is held to be what makes servers fail
_FAILURES = 3  # of a server, one after the other: a connection may break off, and the server be well


class EnginesLost(RuntimeError):
    """No server has answered for too long, or a sequence makes every server fail."""


@dataclass(frozen=True)
class DueWeights:
    """What servers have to serve: a version, and where a server that has others finds it on a disk."""

    version: int = -1
    directory: str | None = None


@dataclass
class Server:
    """What is known of one server."""

    client: EngineClient
    held: int = 0  # requests it has not answered
    failures: int = 0  # since it last answered
    is_up: bool = True
    why_not: str = ""


class ServerPool:
    """The servers, while an event loop runs: `async with ServerPool(...)`.

    Args:
        urls: one of each server.
        due: the weights they have to serve.
        patience_seconds: how long no server at all may answer before EnginesLost.
        transport: how calls travel; None: over TCP.
    """

    def __init__(
        self,
        urls: Sequence[str],
        due: DueWeights,
        patience_seconds: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.due, self._patience = due, patience_seconds
        self._http = httpx.AsyncClient(limits=LIMITS, transport=transport, trust_env=False)
        self.servers = [Server(EngineClient(url, self._http)) for url in urls]
        self._changed = asyncio.Condition()
        self._last_up = time.monotonic()
        self._revivals: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ServerPool:
        return self

    async def __aexit__(self, *_error: object) -> None:
        for task in list(self._revivals):
            task.cancel()
        await asyncio.gather(*self._revivals, return_exceptions=True)
        await self._http.aclose()

    async def wait_until_ready(self) -> None:
        """Return when every server answers. Raises EnginesLost where one does not within the patience."""
        limit = time.monotonic() + self._patience
        for server in self.servers:
            while not await server.client.is_healthy():
                if time.monotonic() > limit:
                    raise EnginesLost(
                        f"{server.client.url}: no answer within {self._patience:g} s (run.timeout_minutes)"
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def each(self, call: Callable[[EngineClient, int], Awaitable[T]]) -> list[T]:
        """A call to every server at once, with its number; what they gave, in order."""
        return list(await asyncio.gather(*(call(server.client, i) for i, server in enumerate(self.servers))))

    async def answer(self, call: Callable[[EngineClient], Awaitable[Answer]]) -> Answer:
        """A whole answer by the weights that are due."""

        async def checked(client: EngineClient) -> Answer:
            answer = await call(client)
            if answer.weight_version != str(self.due.version):
                raise EngineUnavailable(f"{client.url}: serves weights {answer.weight_version}, not {self.due.version}")
            if answer.finish_reason is FinishReason.abort:
                raise EngineUnavailable(f"{client.url}: broke the sequence off")
            return answer

        return await self.ask(checked)

    async def ask(self, call: Callable[[EngineClient], Awaitable[T]]) -> T:
        """The result of `call` by whichever server gives one."""
        errors: list[str] = []
        while len(errors) < ATTEMPTS:
            server = await self._least_loaded()
            server.held += 1
            try:
                found = await call(server.client)
            except EngineUnavailable as error:
                errors.append(str(error))
                server.failures += 1
                if server.failures >= _FAILURES:
                    self._leave_out(server, str(error))
            else:
                server.failures = 0
                self._last_up = time.monotonic()
                return found
            finally:
                server.held -= 1
        raise EnginesLost(f"a sequence was asked for {ATTEMPTS} times in vain, last: {errors[-1]}")

    async def _least_loaded(self) -> Server:
        """The server that holds the fewest requests, once there is one that answers."""
        async with self._changed:
            while True:
                up = [server for server in self.servers if server.is_up]
                if up:
                    return min(up, key=lambda server: server.held)
                if time.monotonic() - self._last_up > self._patience:
                    reasons = "; ".join(server.why_not for server in self.servers)
                    raise EnginesLost(
                        f"no server has answered for {self._patience:g} s (run.timeout_minutes): {reasons}"
                    )
                try:
                    await asyncio.wait_for(self._changed.wait(), POLL_SECONDS)
                except TimeoutError:
                    continue

    def _leave_out(self, server: Server, reason: str) -> None:
        if not server.is_up:
            return
        server.is_up, server.why_not = False, reason
        print(f"engine left out until it serves weights {self.due.version}: {reason}", file=sys.stderr)
        task = asyncio.create_task(self._revive(server))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, server: Server) -> None:
        """Take a server in again when it serves the right weights."""
        try:
            await self.bring_up_to_date(server)
        except (EnginesLost, EngineRefused) as error:
            server.why_not += f", then {error}"  # the others go on; where there are none, their patience ends
            print(f"engine stays left out: {error}", file=sys.stderr)
            return
        async with self._changed:
            server.is_up, server.why_not, server.failures = True, "", 0
            self._changed.notify_all()
        print(f"engine is back: {server.client.url}", file=sys.stderr)

    async def bring_up_to_date(self, server: Server, *, again: bool = False) -> None:
        """Wait until the server answers, and give it the weights that are due: where it has others, or in any case."""
        limit = time.monotonic() + self._patience
        reason = "no answer"
        while time.monotonic() < limit:
            try:
                if await server.client.is_healthy():
                    if not again and await server.client.weight_version() == str(self.due.version):
                        return
                    if self.due.directory is None:
                        raise EngineRefused(f"{server.client.url}: no weights have been published yet")
                    await server.client.load_from_disk(self.due.directory, str(self.due.version), self._patience)
                    return
            except EngineUnavailable as error:
                reason = str(error)
            await asyncio.sleep(POLL_SECONDS)
        raise EnginesLost(f"{server.client.url}: does not serve weights {self.due.version}: {reason}")
