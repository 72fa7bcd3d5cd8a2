"""Which option a response names, and when it names none."""

from __future__ import annotations

import pytest

from r1mega.reward.choice import choice_is_right
from r1mega.types import Prompt

OPTIONS = ("red", "green", "blue", "no colour")


def score(text: str, gold: str = "C", options: tuple[str, ...] = OPTIONS):
    return choice_is_right(Prompt("p", "Which?", gold, domain="choice", options=options), text)


@pytest.mark.parametrize(
    "text",
    [
        "<think> A? </think> <answer> C </answer>",
        "<think> A? </think> <answer> (C) </answer>",
        "<answer> c </answer>",
        "<answer>C. blue</answer>",
        "<answer> (C) Blue. </answer>",
        "<answer> Option C </answer>",
        "<answer> blue </answer>",
        "<answer> \\boxed{C} </answer>",
        "<answer> \\boxed{\\text{C}} </answer>",
        "<answer> It is blue. Answer: C </answer>",
        "<think> Answer: A </think> It is blue.\nAnswer: C",
        "</think> **Answer:** C.",
        "</think> Answer: **C**",
        "</think> answer: $C$",
        "</think> Answer: \\boxed{C}",
        "</think> Answer: A\nNo.\nAnswer: C",
        "</think> So $\\boxed{C}$.",
        "</think> So \\boxed{blue}.",
    ],
)
def test_the_right_option(text: str) -> None:
    assert score(text).value == 1.0
    assert score(text, gold="blue").value == 1.0
    other = score(text, gold="B")
    assert (other.value, other.reason, other.error) == (0.0, "wrong option C", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "C",
        "It is C.",
        "<think> Answer: C </think>",
        "<think> Answer: C",
        "<think> \\boxed{C} </think> blue",
        "<answer> C or D </answer>",
        "<answer> A B C D </answer>",
        "<answer> Answer: A, B, C or D </answer>",
        "</think> Answer: C or D",
        "</think> Answer: C, D",
        "</think> Answer: C/D",
        "</think> Answer: a lot",
        "</think> Answer: Certainly",
        "<answer> C. red </answer>",  # the letter of one, the wording of another
        "<answer> С </answer>",  # Cyrillic
        "<answer> Ｃ </answer>",
        "<answer> \\boxed{CD} </answer>",
        "<answer> E </answer>",
        "<answer> </answer>",
        "<answer> " + "C" * 1_000_000 + " </answer>",
        "Answer: " * 100_000,
    ],
)
def test_no_option(text: str) -> None:
    got = score(text)
    assert (got.value, got.reason, got.error) == (0.0, "no option is named in the answer", None)


def test_options_beyond_the_fourth() -> None:
    eight = tuple(f"number {i}" for i in range(8))
    assert score("<answer> H </answer>", "H", eight).value == 1.0
    assert score("<answer> H </answer>", "G", eight).value == 0.0


@pytest.mark.parametrize(
    ("gold", "options", "message"),
    [
        ("C", OPTIONS[:3], "p: got 3 options; must be 4 to 8"),
        ("C", (), "p: got 0 options; must be 4 to 8"),
        ("A", OPTIONS * 3, "p: got 12 options; must be 4 to 8"),
        ("E", OPTIONS, "the known answer 'E' is none of the options"),
        ("yellow", OPTIONS, "the known answer 'yellow' is none of the options"),
    ],
)
def test_faults_of_the_data_are_errors(gold: str, options: tuple[str, ...], message: str) -> None:
    assert message in score("<answer> C </answer>", gold, options).error


def test_a_letter_that_is_also_a_wording_is_a_letter() -> None:
    assert score("<answer> B </answer>", "B", ("C", "A", "D", "B")).value == 1.0
    assert score("<answer> \\boxed{D} </answer>", "B", ("C", "A", "D", "B")).value == 0.0
