from __future__ import annotations

import sys
from pathlib import Path

import pytest

from r1mega.rollout import occupancy
from r1mega.rollout.occupancy import ServerMemory
from r1mega.rollout.server import CACHE, EVERYTHING, WEIGHTS
from r1mega.rollout.server_pool import EnginesLost
from r1mega.rollout.sglang import SglangEngines

sys.path.insert(0, str(Path(__file__).parent))
from fake_servers import FakeServers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "_POLL_SECONDS", 0.01)


def memory(fake: FakeServers, patience: float = 5.0) -> ServerMemory:
    servers = SglangEngines(fake.urls, max_in_flight=8, patience_seconds=patience, transport=fake)
    return ServerMemory(servers, patience)


def test_a_round_of_turns() -> None:
    fake = FakeServers(2)
    held = memory(fake)
    for wanted in (EVERYTHING, (), (), (WEIGHTS,), EVERYTHING, EVERYTHING):
        held.hold(wanted)
        assert all(server.held == set(wanted) for server in fake.servers)
    for server in fake.servers:
        assert server.calls == [("release", WEIGHTS, CACHE), ("resume", WEIGHTS), ("resume", CACHE)]


def test_a_server_started_again_holds_everything() -> None:
    """It gives back what it took at its start, and is never asked for what it has."""
    fake = FakeServers(2)
    held = memory(fake)
    held.hold(())
    fake.servers[1].held, fake.servers[1].starts = set(EVERYTHING), 2
    held.hold((WEIGHTS,))
    assert [server.held for server in fake.servers] == [{WEIGHTS}, {WEIGHTS}]
    assert fake.servers[1].calls[-1] == ("release", CACHE)
    fake.servers[0].held, fake.servers[0].starts = set(EVERYTHING), 2
    held.hold(EVERYTHING)
    assert fake.servers[0].calls[-1] == ("resume", WEIGHTS) and fake.servers[1].calls[-1] == ("resume", CACHE)


def test_a_server_that_is_being_started_is_waited_for() -> None:
    fake = FakeServers(1)
    fake.servers[0].is_up = False
    with pytest.raises(EnginesLost, match=r"within 0.1 s \(run.timeout_minutes\): http://0: does not answer"):
        memory(fake, patience=0.1).hold(())
    asked = []
    handle = fake.handle_async_request

    async def later(request):
        asked.append(request)
        fake.servers[0].is_up = len(asked) > 5
        return await handle(request)

    fake.handle_async_request = later  # type: ignore[method-assign]
    memory(fake).hold(())
    assert fake.servers[0].held == set()
