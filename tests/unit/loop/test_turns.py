from __future__ import annotations

import pytest
import torch.distributed as dist

from r1mega.loop.turns import Turns
from r1mega.rollout.server import CACHE, WEIGHTS
from r1mega.weights.shelf import Shelf


class Both:
    """A policy and servers that note what they are asked for, in one order."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def hand_over(self, *, keeps_weights: bool = False) -> int:
        self.asked.append("all" if not keeps_weights else "all but weights")
        return 0

    def hold(self, tags: tuple[str, ...]) -> None:
        self.asked.append(tags)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_round(alone, tmp_path) -> None:
    """Each side has given before the other takes; the launcher may start servers but in the trainer's turn."""
    noted, place = Both(), Shelf(tmp_path / "engines")
    place.prepare()
    turns = Turns(noted, alone, noted, place)
    turns.engines()
    turns.trainer()
    assert place.is_trainers_turn
    turns.both()
    assert not place.is_trainers_turn
    turns.engines()
    turns.engines()
    assert noted.asked == ["all", (), "all but weights", (WEIGHTS,), "all", (WEIGHTS, CACHE), "all"]


def test_a_server_may_be_started_before_it_is_waited_for(alone, tmp_path) -> None:
    noted, place = Both(), Shelf(tmp_path / "engines")
    place.prepare()
    seen = []
    noted.hold = lambda tags: seen.append((tags, place.is_trainers_turn))
    turns = Turns(None, alone, noted, place)
    for turn in (turns.trainer, turns.engines, turns.trainer):
        turn()
    assert seen == [((), False), ((WEIGHTS, CACHE), False), ((), False)] and place.is_trainers_turn


def test_where_servers_keep_their_memory() -> None:
    noted = Both()
    turns = Turns(noted)
    for turn in (turns.both, turns.engines, turns.trainer, turns.engines):
        turn()
    assert noted.asked == ["all", "all"]
    nothing = Turns()
    for turn in (nothing.both, nothing.engines, nothing.trainer):
        turn()
