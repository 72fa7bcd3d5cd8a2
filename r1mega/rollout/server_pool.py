"""Several SGLang servers asked as one: each call goes to the server that holds the fewest, to another where it fails.

A server that breaks off is left out until it answers again with the weights that are due. Who restarts servers is
launch/engines.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

from r1mega.rollout.client import Answer, EngineClient, NoServerBehind
from r1mega.types import EngineRefused, EngineUnavailable, FinishReason

T = TypeVar("T")
# A connection for each call: measured 260 short requests a second, and 66 over connections that are kept.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
POLL_SECONDS = 0.5
ATTEMPTS = 10  # of one sequence, before it is held to be what makes servers fail
_FAILURES = 3  # of a server, one after the other: a connection may break off, and the server be well


class StaleWeights(EngineUnavailable):
    """An answer by other weights than those that are due."""


class EnginesLost(RuntimeError):
    """No server has answered for too long, or a sequence makes every server fail."""


@dataclass(frozen=True)
class DueWeights:
    """What servers have to serve: a version, and where a server that has others finds it on a disk.

    `is_coming`: it may still be being written, and is moved there when it is whole.
    """

    version: int = -1
    directory: str | None = None
    is_coming: bool = False


@dataclass
class Server:
    """What is known of one server."""

    client: EngineClient
    held: int = 0  # requests it has not answered
    failures: int = 0  # since it last answered
    is_up: bool = True
    has_answered: bool = True  # since it was last left out
    is_paused: bool = False  # by us: what it held goes on when it is resumed
    why_not: str = ""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one at a time gives it weights


class ServerPool:
    """The servers, for as long as an event loop runs: `async with ServerPool(...)`.

    Args:
        urls: one of each server.
        patience_seconds: how long no server at all may answer before EnginesLost.
        transport: how calls travel; None: over TCP.
        router_url: of a router before the servers, which answers are asked of; all else goes to the servers.
        pauses: whether requests may run while weights are loaded: they are put back into the server's queue, and go on
            under the new weights after `resume`.

    `due` are the weights that servers have to serve. While they are published, answers by the ones before are as good:
    `floor` is the version that all servers served when the last publish ended.
    """

    def __init__(
        self,
        urls: Sequence[str],
        patience_seconds: float,
        transport: httpx.AsyncBaseTransport | None = None,
        router_url: str | None = None,
        *,
        pauses: bool = False,
    ) -> None:
        self.due, self.floor = DueWeights(), -1
        self._patience, self._pauses = patience_seconds, pauses
        self._http = httpx.AsyncClient(limits=LIMITS, transport=transport, trust_env=False)
        self.servers = [Server(EngineClient(url, self._http)) for url in urls]
        self._router = Server(EngineClient(router_url, self._http)) if router_url is not None else None
        self._changed = asyncio.Condition()
        self._last_up = time.monotonic()
        self._revivals: dict[asyncio.Task[None], Server] = {}

    async def __aenter__(self) -> ServerPool:
        return self

    async def __aexit__(self, *_error: object) -> None:
        for task in list(self._revivals):
            task.cancel()
        await asyncio.gather(*self._revivals, return_exceptions=True)
        await self._http.aclose()

    def try_again(self) -> None:
        """Ask servers again that were given up for good."""
        reviving = list(self._revivals.values())
        for server in self.servers:
            if not server.is_up and server not in reviving:
                server.is_up, server.failures, server.why_not = True, 0, ""

    async def wait_until_ready(self) -> None:
        """Return when every server answers. Raises EnginesLost where one does not within the patience."""
        limit = time.monotonic() + self._patience
        for server in self.servers:
            while not await self._answers(server):
                if time.monotonic() > limit:
                    raise EnginesLost(
                        f"{server.client.url}: no answer within {self._patience:g} s (run.timeout_minutes)"
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def _answers(self, server: Server) -> bool:
        """Whether the server is well, as far as can be seen: one that is paused answers no health check."""
        if not server.is_paused:
            return await server.client.is_healthy()
        try:
            await server.client.weight_version()
        except EngineUnavailable:
            return False
        return True

    async def pause(self) -> None:
        """Put what every server runs back into its queue, where requests may run while weights are loaded."""

        async def stop(server: Server) -> None:
            async with server.loading:  # who gives it weights at the moment would let it go on
                await self._pause(server)

        await asyncio.gather(*(stop(server) for server in self.servers))

    async def _pause(self, server: Server) -> None:
        if self._pauses:
            server.is_paused = True  # also where the answer is lost on its way
            await server.client.pause("retract")

    async def resume(self) -> None:
        """Let every server that was paused go on. One that has ended meanwhile starts without being paused."""

        async def go_on(server: Server) -> None:
            server.is_paused, was_paused = False, server.is_paused
            for attempt in range(_FAILURES if was_paused else 0):
                try:
                    return await server.client.resume()
                except EngineUnavailable as error:
                    if attempt == _FAILURES - 1:
                        self._leave_out(server, str(error))
                await asyncio.sleep(POLL_SECONDS)

        await asyncio.gather(*(go_on(server) for server in self.servers))

    async def each(self, call: Callable[[EngineClient, int], Awaitable[T]]) -> list[T]:
        """A call to every server at once, with its number; what they gave, in order."""
        return list(await asyncio.gather(*(call(server.client, i) for i, server in enumerate(self.servers))))

    async def answer(self, call: Callable[[EngineClient], Awaitable[Answer]]) -> Answer:
        """A whole answer by the weights that are due."""

        async def checked(client: EngineClient) -> Answer:
            found = await self.checked(call, client)
            if found.finish_reason is FinishReason.abort:
                raise EngineUnavailable(f"{client.url}: broke the sequence off")
            return found

        return await self.ask(checked, self.servers if self._router is None else [self._router])

    async def checked(self, call: Callable[[EngineClient], Awaitable[Answer]], client: EngineClient) -> Answer:
        """The answer of `call`, by weights that all servers served when it was asked for, or newer ones that are due.

        Raises EngineUnavailable where another version has generated any of it.
        """
        oldest = self.floor
        answer = await call(client)
        try:
            versions = [span.weight_version for span in answer.spans()]
        except EngineUnavailable as error:
            raise StaleWeights(f"{client.url}: {error}") from error
        if versions != sorted(versions) or not all(oldest <= version <= self.due.version for version in versions):
            shown = ", ".join(map(str, versions))
            raise StaleWeights(f"{client.url}: serves weights {shown}, not {self.due.version}")
        return answer

    async def ask(self, call: Callable[[EngineClient], Awaitable[T]], those: Sequence[Server] | None = None) -> T:
        """The result of `call` by whichever server gives one, or whichever of `those`."""
        errors: list[str] = []
        while len(errors) < ATTEMPTS:
            server = await self._least_loaded(self.servers if those is None else those)
            server.held += 1
            try:
                found = await call(server.client)
            except EngineUnavailable as error:
                if not isinstance(error, NoServerBehind):  # who was not asked did not fail
                    errors.append(str(error))
                server.failures += 1
                if server.failures >= _FAILURES or self._hides(server, error):
                    self._leave_out(server, str(error))
            else:
                server.failures, server.has_answered = 0, True
                return found
            finally:
                server.held -= 1
        raise EnginesLost(f"a sequence was asked for {ATTEMPTS} times in vain, last: {errors[-1]}")

    def _hides(self, server: Server, error: EngineUnavailable) -> bool:
        """Whether it is the router, which would give the next sequence to the server that is at fault as well."""
        return server is self._router and isinstance(error, StaleWeights | NoServerBehind)

    async def _least_loaded(self, those: Sequence[Server]) -> Server:
        """Of those, the server that holds the fewest requests, once there is one that answers."""
        async with self._changed:
            while True:
                up = [server for server in those if server.is_up]
                if up:
                    return min(up, key=lambda server: server.held)
                if time.monotonic() - self._last_up > self._patience:
                    reasons = "; ".join(server.why_not for server in those)
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
        # A router that is there and has no server behind it would else be waited for again and again.
        if server.has_answered if server is self._router else not any(other.is_up for other in self.servers):
            self._last_up = time.monotonic()
        server.has_answered = False
        name = "router" if server is self._router else "engine"
        print(f"{name} left out until it serves weights {self.due.version}: {reason}", file=sys.stderr)
        task = asyncio.create_task(self._revive(server))
        self._revivals[task] = server
        task.add_done_callback(self._revivals.pop)

    async def _revive(self, server: Server) -> None:
        """Take a server in again when it serves the right weights."""
        try:
            if server is self._router:
                await self._look_behind(server)
            else:
                await self.bring_up_to_date(server)
        except (EnginesLost, EngineRefused) as error:
            server.why_not += f", then {error}"  # the others go on; where there are none, their patience ends
            print(f"engine stays left out: {error}", file=sys.stderr)
            return
        async with self._changed:
            server.is_up, server.why_not, server.failures = True, "", 0
            self._changed.notify_all()
        print(f"engine is back: {server.client.url}", file=sys.stderr)

    async def _look_behind(self, router: Server) -> None:
        """Give the weights that are due to servers that answer with others, and wait until the router has servers."""

        async def mend(server: Server) -> None:
            try:
                is_due = await server.client.weight_version() == str(self.due.version)
            except EngineUnavailable:
                return  # it is the router that passes it over
            if not is_due:
                await self.bring_up_to_date(server)

        limit = time.monotonic() + self._patience
        await asyncio.sleep(POLL_SECONDS)
        await asyncio.gather(*(mend(server) for server in self.servers))
        while not await router.client.has_servers():
            if time.monotonic() > limit:
                raise EnginesLost(f"{router.client.url}: has no server that answers")
            await asyncio.sleep(POLL_SECONDS)

    async def bring_up_to_date(self, server: Server, *, again: bool = False) -> None:
        """Wait until the server answers, and give it the weights that are due: where it has others, or in any case.

        A server that may run requests stays paused when it was given weights `again`, until `resume`.
        """
        limit = time.monotonic() + self._patience
        reason = "no answer"
        while time.monotonic() < limit:
            try:
                async with server.loading:
                    if await self._answers(server):
                        if not again and await server.client.weight_version() == str(self.due.version):
                            return
                        if self.due.directory is None:
                            raise EngineRefused(f"{server.client.url}: no weights have been published yet")
                        if not self.due.is_coming or Path(self.due.directory).is_dir():
                            await self._load(server, again=again)
                            return
                        reason = f"{self.due.directory} is not written yet"
            except EngineUnavailable as error:
                reason = str(error)
            await asyncio.sleep(POLL_SECONDS)
        raise EnginesLost(f"{server.client.url}: does not serve weights {self.due.version}: {reason}")

    async def _load(self, server: Server, *, again: bool) -> None:
        due, was_paused = self.due, server.is_paused
        assert due.directory is not None
        await self._pause(server)
        await server.client.load_from_disk(due.directory, str(due.version), self._patience, is_paused=server.is_paused)
        if not (again or was_paused) and server.is_paused:
            server.is_paused = False
            await server.client.resume()
