"""The weighted sum of named rewards."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest

from r1mega.reward.code import CodeLimits
from r1mega.reward.compose import Rule, RuleSettings
from r1mega.types import Prompt

PROMPT = Prompt(id="p", question="?", answer="2")


@pytest.mark.parametrize(
    ("text", "parts", "value"),
    [
        ("<think> a </think> <answer> 2 </answer>", {"accuracy": 1.0, "format": 1.0}, 1.5),
        ("<think> a </think> <answer> 3 </answer>", {"accuracy": 0.0, "format": 1.0}, 0.5),
        ("<answer> 2 </answer>", {"accuracy": 1.0, "format": 0.0}, 1.0),
        ("2", {"accuracy": 0.0, "format": 0.0}, 0.0),
    ],
)
def test_parts_are_kept_unweighted_and_summed_weighted(text: str, parts: dict[str, float], value: float) -> None:
    score = Rule({"accuracy": 1.0, "format": 0.5})(PROMPT, text)
    assert score.parts == parts
    assert score.value == value


def test_reasons_stand_behind_their_names() -> None:
    score = Rule({"accuracy": 1.0, "format": 1.0})(PROMPT, "2")
    assert score.reason == "accuracy: no answer; format: <think> appears 0 times, once is expected"
    assert Rule({"format": 1.0})(PROMPT, "2").reason == "format: <think> appears 0 times, once is expected"


def test_a_part_that_fails_counts_nothing_and_says_so() -> None:
    prompt = Prompt(id="p", question="?", answer="???")
    score = Rule({"accuracy": 1.0, "format": 1.0})(prompt, "<think> a </think> <answer> 2 </answer>")
    assert score.value == 1.0
    assert score.error is not None
    assert score.error.startswith("accuracy: the known answer '???'")


@pytest.mark.parametrize("answer", ["2", "3", "2.0", ""])
def test_the_quick_sum_is_the_full_sum(answer: str) -> None:
    rule = Rule({"accuracy": 1.0, "format": 1.0})
    text = f"<think> a </think> <answer> {answer} </answer>"
    assert rule.quick(PROMPT, text) == rule(PROMPT, text)


def test_one_slow_part_makes_the_sum_slow() -> None:
    text = "<think> a </think> <answer> 4/2 </answer>"
    assert Rule({"accuracy": 1.0, "format": 1.0}).quick(PROMPT, text) is None
    assert Rule({"format": 1.0}).quick(PROMPT, text) is not None


def test_a_rule_can_be_made_in_another_process() -> None:
    factory = pickle.loads(pickle.dumps(partial(Rule, {"accuracy": 1.0})))
    assert factory()(PROMPT, "<answer> 2 </answer>").value == 1.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [({}, "empty"), ({"acuracy": 1.0}, "unknown reward 'acuracy'.*accuracy, format"), ({"format": math.nan}, "finite")],
)
def test_wrong_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(weights)


OPTIONS = ("red", "green", "blue", "none")
THINK = "<think> we see </think> <answer> {} </answer>"


@pytest.mark.parametrize(
    ("prompt", "answer", "accuracy"),
    [
        (Prompt("p", "?", "2"), "4/2", 1.0),
        (Prompt("p", "?", "3", other_answers=("2",)), "4/2", 1.0),
        (Prompt("p", "?", "3", other_answers=("4",)), "4/2", 0.0),
        (Prompt("p", "?", "B", domain="stem", options=OPTIONS), "green", 1.0),
        (Prompt("p", "?", "B", domain="choice", options=OPTIONS), "C", 0.0),
        (Prompt("p", "?", "B", domain="logic", options=OPTIONS), "(B)", 1.0),
        (Prompt("p", "?", "0.5", domain="logic"), "1/2", 1.0),
        (Prompt("p", "?", "", domain="code", tests=({"input": "", "output": "1"},)), "1", 0.0),
    ],
)
def test_the_domain_says_how_an_answer_is_judged(prompt: Prompt, answer: str, accuracy: float) -> None:
    score = Rule({"accuracy": 1.0, "format": 1.0, "language": 0.5})(prompt, THINK.format(answer))
    assert score.parts == {"accuracy": accuracy, "format": 1.0, "language": 1.0}
    assert score.value == accuracy + 1.5
    assert score.error is None


def test_a_general_question_has_no_accuracy() -> None:
    prompt = Prompt("p", "?", "", domain="general")
    assert Rule({"accuracy": 1.0, "format": 1.0})(prompt, THINK.format("hi")).parts == {"format": 1.0}
    only = Rule({"accuracy": 1.0, "format": 0.0})
    for score in (only(prompt, "hi"), only.quick(prompt, "hi")):
        assert (score.value, score.error) == (0.0, "p: no reward among accuracy judges questions of domain 'general'")


def test_an_unknown_domain_is_an_error() -> None:
    assert "domain 'poetry'" in Rule({"accuracy": 1.0})(Prompt("p", "?", "1", domain="poetry"), "1").error


def test_the_language_of_the_settings_gives_way_to_the_rows() -> None:
    rule = Rule({"language": 1.0}, RuleSettings(language="ru"))
    assert rule(Prompt("p", "How?", "1"), THINK.format("1")).value == 0.0
    assert rule(Prompt("p", "How?", "1", language="en"), THINK.format("1")).value == 1.0


def test_only_programs_may_take_longer_than_other_texts() -> None:
    rule = Rule({"accuracy": 1.0}, RuleSettings(CodeLimits(total_seconds=20.0)))
    assert rule.seconds(Prompt("p", "?", "1")) is None
    assert rule.seconds(Prompt("p", "?", "", domain="code")) == 60.0  # tests, compiler, and ten seconds around them
