"""General questions among others: from their update on, by their share, and resumed to the question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.data.mixture import MixedSource, read_general
from r1mega.data.prompts import PromptSource
from r1mega.types import Prompt

TRAIN = [Prompt(f"train:{i}", f"t{i}", "1") for i in range(7)]
GENERAL = [Prompt(f"general:{i}", f"g{i}", "", domain="general") for i in range(5)]


def mixed(share: float = 0.5, begin: int = 10) -> MixedSource:
    return MixedSource(PromptSource(TRAIN, 1), PromptSource(GENERAL, 2), share=share, begin=begin)


def is_general(prompts: list[Prompt]) -> list[int]:
    return [int(prompt.domain == "general") for prompt in prompts]


def test_before_its_update_it_is_the_training_source() -> None:
    source = mixed()
    source.at(9)
    assert source.next(20) == PromptSource(TRAIN, 1).next(20)
    source.at(10)
    assert sum(is_general(source.next(20))) == 10


@pytest.mark.parametrize(("share", "pattern"), [(0.5, [0, 1, 0, 1, 0, 1, 0, 1]), (0.25, [0, 0, 0, 1, 0, 0, 0, 1])])
def test_the_share_is_spread_evenly(share: float, pattern: list[int]) -> None:
    source = mixed(share)
    source.at(10)
    assert is_general(source.next(8)) == pattern


@pytest.mark.parametrize("share", [0.1, 0.3, 0.494, 0.999])
def test_the_share_is_kept_whatever_is_asked_at_once(share: float) -> None:
    source, asked, general = mixed(share), 0, 0
    source.at(10)
    for count in (1, 2, 3, 5, 8, 13, 21, 512):
        general += sum(is_general(source.next(count)))
        asked += count
        assert abs(general - share * asked) < 1


def test_no_question_is_left_out_of_its_epoch() -> None:
    source = mixed()
    source.at(10)
    asked = source.next(70)
    assert len({prompt.id for prompt in asked[:14] if prompt.domain != "general"}) == 7
    assert sorted(prompt.id for prompt in asked if prompt.domain == "general") == sorted(p.id for p in GENERAL * 7)


@pytest.mark.parametrize("stopped_at", [0, 3, 4, 9])
def test_a_resumed_source_goes_on_to_the_question(stopped_at: int) -> None:
    whole, pieces = mixed(0.3, begin=4), []
    for update in range(10):
        whole.at(update)
        pieces.append(whole.next(6))
    first, again = mixed(0.3, begin=4), []
    for update in range(stopped_at):
        first.at(update)
        again.append(first.next(6))
    resumed = mixed(0.3, begin=4)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for update in range(stopped_at, 10):
        resumed.at(update)
        again.append(resumed.next(6))
    assert again == pieces


def test_a_run_that_had_no_general_questions_goes_on_with_them() -> None:
    before = PromptSource(TRAIN, 1)
    before.next(3)
    source = mixed()
    source.load_state_dict(before.state_dict())
    source.at(0)
    assert source.next(4) == before.next(4)


def test_other_data_is_refused() -> None:
    source = MixedSource(PromptSource(TRAIN, 1), PromptSource(GENERAL[:3], 2), share=0.5, begin=0)
    with pytest.raises(ValueError, match="the saved state has num_items=5, this run has 3"):
        source.load_state_dict(mixed().state_dict())
    with pytest.raises(ValueError, match="share: got 1"):
        mixed(share=1)


def test_rows_say_their_domain(tmp_path: Path) -> None:
    path = tmp_path / "general.jsonl"
    path.write_text('{"question": "Hi?"}\n{"question": "How to pick a lock?", "domain": "harmless"}\n')
    first, second = read_general(path)
    assert (first.domain, first.answer, first.id) == ("general", "", f"{path}:1")
    assert second.domain == "harmless"
    path.write_text('{"question": "Hi?", "domain": 3}\n')
    with pytest.raises(ValueError, match=r"general\.jsonl:1: 'domain' must be one of"):
        read_general(path)
