"""The format reward: the exact pattern, and every way to miss it."""

from __future__ import annotations

import pytest

from r1mega.reward.format import r1_zero_format
from r1mega.types import Prompt

PROMPT = Prompt(id="p", question="1+1", answer="2")
GOOD = "<think> one and one </think> <answer> 2 </answer>"


@pytest.mark.parametrize(
    "text",
    [GOOD, f" {GOOD}\n", "<think>a</think><answer>b</answer>", "<think>\na\n\nb\n</think>\n<answer>\n2\n</answer>"],
)
def test_the_published_pattern_scores_one(text: str) -> None:
    assert r1_zero_format(PROMPT, text).value == 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "<think> appears 0 times"),
        ("2", "<think> appears 0 times"),
        ("<think> a <answer> 2 </answer>", "</think> appears 0 times"),
        ("<think> a </think> 2", "<answer> appears 0 times"),
        ("<think> a </think> <answer> 2", "</answer> appears 0 times"),
        (GOOD + GOOD, "<think> appears 2 times"),
        ("<think> <think> a </think> <answer> 2 </answer>", "<think> appears 2 times"),
        ("<answer> 2 </answer> <think> a </think>", "wrong order"),
        ("<think> a <answer> 2 </answer> </think>", "wrong order"),
        ("</think> a <think> <answer> 2 </answer>", "wrong order"),
        ("<think>  </think> <answer> 2 </answer>", "nothing between <think> and </think>"),
        ("<think> a </think> <answer>\n</answer>", "nothing between <answer> and </answer>"),
        ("Well. " + GOOD, "text before <think>"),
        ("<think> a </think> so <answer> 2 </answer>", "text between"),
        (GOOD + " Bye.", "text after </answer>"),
        ("<THINK> a </THINK> <answer> 2 </answer>", "<think> appears 0 times"),
    ],
)
def test_anything_else_scores_zero_and_says_why(text: str, reason: str) -> None:
    score = r1_zero_format(PROMPT, text)
    assert score.value == 0.0
    assert reason in score.reason
    assert score.error is None
