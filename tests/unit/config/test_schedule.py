"""Values by the count of updates, exact at the boundary; and the rules they keep."""

from __future__ import annotations

import pytest

from r1mega.config.check_schedule import check_schedule
from r1mega.config.choices import Loop
from r1mega.config.schedule import has_preferences, max_tokens_at, most_tokens, value_at
from r1mega.config.schema import Config


@pytest.fixture
def config() -> Config:
    made = Config()
    made.stage.loop = Loop.rl
    made.rollout.max_tokens, made.algo.updates = 100, 1000
    return made


@pytest.mark.parametrize(("update", "value"), [(0, 1), (9, 1), (10, 2), (11, 2), (19, 2), (20, 3), (10**6, 3)])
def test_a_value_holds_from_its_update_on(update: int, value: int) -> None:
    assert value_at(update, 1, [[20, 3], [10, 2]]) == value


def test_without_changes_the_first_value_holds() -> None:
    assert value_at(10**6, 7, []) == 7


def test_the_longest_of_all_rounds(config: Config) -> None:
    assert most_tokens(config) == ("rollout.max_tokens", 100)
    config.rollout.max_tokens_from = [[500, 50]]
    assert most_tokens(config) == ("rollout.max_tokens", 100)
    config.rollout.max_tokens_from = [[700, 150], [500, 200]]
    assert most_tokens(config) == ("rollout.max_tokens_from", 200)
    assert [max_tokens_at(config, update) for update in (499, 500, 699, 700)] == [100, 200, 200, 150]


def test_preferences_from_the_first_update_unless_said_otherwise(config: Config) -> None:
    assert has_preferences(config, 0)
    config.reward.preference_from = 1300
    assert [has_preferences(config, update) for update in (0, 1299, 1300)] == [False, False, True]


def messages(config: Config) -> list[str]:
    return [str(fault) for fault in check_schedule(config)]


def test_a_sound_schedule(config: Config) -> None:
    config.rollout.max_tokens_from = [[500, 200]]
    config.reward.preference_from, config.reward.helpful, config.data.general = 999, 1.0, "general.jsonl"
    assert messages(config) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([[500, 0]], "rollout.max_tokens_from: got [500, 0]; a response has at least 1 token"),
        ([[0, 200]], "rollout.max_tokens_from: got [0, 200]; update 0 has rollout.max_tokens"),
        ([[1000, 200]], "rollout.max_tokens_from: got [1000, 200]; no update from 1000 on is done: algo.updates=1000"),
        ([[500]], "rollout.max_tokens_from: got [500]; must be a pair"),
        ([[]], "rollout.max_tokens_from: got []; must be a pair"),
        ([[500, 1, 2]], "rollout.max_tokens_from: got [500, 1, 2]; must be a pair"),
        ([[500, 200], [500, 300]], "rollout.max_tokens_from: got [[500, 200], [500, 300]]; gives two lengths for one"),
    ],
)
def test_lengths_that_cannot_be(config: Config, changes: list[list[int]], message: str) -> None:
    config.rollout.max_tokens_from = changes
    (found,) = messages(config)
    assert found.startswith(message)


def test_lengths_fall_only_where_no_sequence_goes_on(config: Config) -> None:
    config.rollout.max_tokens_from = [[500, 50]]
    assert messages(config) == []
    config.rollout.max_staleness = 1
    (found,) = messages(config)
    assert found.startswith("rollout.max_tokens_from: got [100, 50]; must not fall")


def test_general_questions_need_a_judge_and_updates(config: Config) -> None:
    config.data.general, config.reward.preference_from = "general.jsonl", 1000
    assert [text.partition(":")[0] for text in messages(config)] == ["data.general", "reward.preference_from"]
    config.stage.loop = Loop.sft
    assert [text.partition(":")[0] for text in messages(config)] == ["data.general"]
