"""Which memory each server holds: weights and cache are given back to the trainer and taken again.

A server that was started again in between holds everything: it is known by its identity, and asked for what it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from r1mega.rollout.client import EngineClient
from r1mega.rollout.server import EVERYTHING
from r1mega.rollout.server_pool import EnginesLost
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import EngineUnavailable

_POLL_SECONDS = 0.5


class ServerMemory:
    """What the servers hold. One at a time asks for a change, between generations.

    Args:
        patience_seconds: how long a server may take to answer before EnginesLost.
    """

    def __init__(self, servers: SglangEngines, patience_seconds: float) -> None:
        self._servers, self._patience = servers, patience_seconds
        self._held: dict[int, tuple[str, tuple[str, ...]]] = {}  # server -> (its identity, what it holds)

    def hold(self, wanted: Iterable[str]) -> None:
        """Have every server hold exactly these of EVERYTHING. Weights that come back are garbage until a publish.

        A server that is being started is waited for. Raises EnginesLost where one does not answer within the patience,
        EngineRefused where one is not idle.
        """
        tags = tuple(tag for tag in EVERYTHING if tag in set(wanted))
        self._servers.each(lambda client, index: self._bring(client, index, tags))

    async def _bring(self, client: EngineClient, index: int, wanted: tuple[str, ...]) -> None:
        limit = time.monotonic() + self._patience
        while True:
            try:
                if not await client.is_healthy():
                    raise EngineUnavailable(f"{client.url}: does not answer")
                await self._change(client, index, wanted)
                return
            except EngineUnavailable as error:
                if time.monotonic() > limit:
                    raise EnginesLost(f"within {self._patience:g} s (run.timeout_minutes): {error}") from error
            await asyncio.sleep(_POLL_SECONDS)

    async def _change(self, client: EngineClient, index: int, wanted: tuple[str, ...]) -> None:
        identity = await client.identity()
        known, held = self._held.get(index, (identity, EVERYTHING))
        if known != identity:
            held = EVERYTHING
        too_much = [tag for tag in held if tag not in wanted]
        too_little = [tag for tag in wanted if tag not in held]
        if too_much:
            await client.release(too_much)
            held = tuple(tag for tag in held if tag in wanted)
            self._held[index] = identity, held
        if too_little:
            await client.reclaim(too_little)
        self._held[index] = identity, wanted
