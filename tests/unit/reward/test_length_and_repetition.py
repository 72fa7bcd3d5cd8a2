"""The penalties on length and on repetition, worked out by hand."""

from __future__ import annotations

import pytest

from r1mega.reward.length import add_length_penalty, overlong_penalty
from r1mega.reward.repetition import PASSAGE_WORDS, repetition_penalty
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score

PROMPT = Prompt("p", "q", "a")


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [
        # DAPO's own numbers: 20,480 tokens at most, 4,096 of them the buffer.
        (0, 0.0),
        (16_384, 0.0),
        (16_385, -1 / 4096),
        (17_408, -0.25),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1.0),
        (30_000, -1.0),
    ],
)
def test_daposs_penalty_by_hand(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, 20_480, 4096) == penalty


def test_the_penalty_joins_the_scores() -> None:
    def sample(num_tokens: int, score: Score | None) -> Sample:
        ones = [1] * num_tokens
        return Sample("p", 0, ones, ones, [0.0] * num_tokens, FinishReason.stop, 0, score=score)

    good = sample(9, Score(2.0, {"accuracy": 1.0, "format": 1.0}, reason="r"))
    failed = sample(10, Score(0.0, {"accuracy": 0.0}, error="killed"))
    unscored = sample(10, None)
    add_length_penalty([SampleGroup(PROMPT, [good, failed, unscored])], 0.5, max_tokens=10, buffer=4)
    assert good.score == Score(2.0 - 0.5 * 0.75, {"accuracy": 1.0, "format": 1.0, "length": -0.75}, reason="r")
    assert failed.score == Score(-0.5, {"accuracy": 0.0, "length": -1.0}, error="killed")
    assert unscored.score is None


def numbered(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("", 0.0),
        ("again " * (PASSAGE_WORDS - 1), 0.0),  # no passage
        ("again " * PASSAGE_WORDS, 0.0),  # one passage
        ("again " * (PASSAGE_WORDS + 3), 1 / 4 - 1),  # four passages, all the same
        (numbered(0, 100), 0.0),
        # 40 words twice: 61 passages, of which the last 21 (60 .. 80 words in) stood at the start.
        (f"{numbered(0, 40)} {numbered(0, 40)}", 40 / 61 - 1),
        ("重复" * 20, 2 / 21 - 1),  # 40 characters in a row: 21 passages, of two kinds
    ],
)
def test_repetition_by_hand(text: str, penalty: float) -> None:
    assert repetition_penalty(PROMPT, text).value == pytest.approx(penalty, abs=1e-12)


def test_repetition_says_how_much() -> None:
    assert repetition_penalty(PROMPT, "again " * 23).reason == "3 of 4 passages of 20 words stood there before"
