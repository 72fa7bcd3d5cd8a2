"""The pool of servers behind a router that hides which of them failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest

from r1mega.rollout import server_pool
from r1mega.rollout.server_pool import EnginesLost
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import Completion, FinishReason, Request, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from fake_servers import FakeServers

PARAMS = SamplingParams(max_tokens=2)
NO_SERVER = {"error": {"type": "Service Unavailable", "code": "no_available_workers", "message": "all circuits open"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "POLL_SECONDS", 0.01)


class FakeRouter(FakeServers):
    """A router at http://router: the prompt [a, ...] goes to server a % 2, whatever that one answers."""

    def __init__(self) -> None:
        super().__init__(2)
        self.refusals = 0  # so many calls find all circuits open, which the readiness of 0.3.2 says nothing of
        self.routed = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host != "router":
            assert request.url.path != "/generate", "sequences are asked of the router"
            return await super().handle_async_request(request)
        if request.url.path == "/readiness":
            return httpx.Response(200)
        assert request.url.path == "/generate"
        if self.refusals > 0:
            self.refusals -= 1
            return httpx.Response(503, json=NO_SERVER)
        self.routed += 1
        body = json.loads(request.content)
        server = self.servers[body["input_ids"][0] % 2]
        return await self._generate(server, body) if server.is_up else httpx.Response(500)


def engines(fake: FakeRouter, patience: float = 5.0) -> SglangEngines:
    made = SglangEngines(
        fake.urls, max_in_flight=1, patience_seconds=patience, transport=fake, router_url="http://router"
    )
    made.load_from_disk("/weights/3", 3)
    return made


def ask(made: SglangEngines, prompts: list[int]) -> None:
    found = made.generate([Request(i, (a,), 1) for i, a in enumerate(prompts)], PARAMS)
    assert found == [Completion(i, 0, [a, a + 1], [-float(a)] * 2, FinishReason.stop, 3) for i, a in enumerate(prompts)]


def test_one_of_the_servers_has_other_weights() -> None:
    """Its prompt would come back to it for ever, while the other server lets the router look well."""
    fake = FakeRouter()
    made = engines(fake)
    fake.servers[1].version = "none"
    ask(made, [1, *[0] * 200])
    assert fake.servers[1].loads == [("/weights/3", "3")] * 2 and fake.servers[0].loads == [("/weights/3", "3")]
    assert fake.routed == 202  # one answer did not count


def test_circuits_that_are_open_for_a_while_are_no_attempts() -> None:
    fake = FakeRouter()
    made = engines(fake)
    fake.refusals = 3 * server_pool.ATTEMPTS
    ask(made, [0, 1, 2])
    assert fake.refusals == 0 and fake.routed == 3


def test_a_router_that_never_has_a_server_again() -> None:
    fake = FakeRouter()
    made = engines(fake, patience=0.3)
    fake.refusals = 10**9
    with pytest.raises(EnginesLost, match=r"no server has answered for 0.3 s .*no_available_workers"):
        ask(made, [0])


def test_a_sequence_that_makes_its_server_fail() -> None:
    """The router says 500 as long as the server is down; that does count."""
    fake = FakeRouter()
    made = engines(fake)
    fake.servers[1].is_up = False
    with pytest.raises(EnginesLost, match="asked for 10 times in vain, last: http://router/generate: 500"):
        ask(made, [1])
