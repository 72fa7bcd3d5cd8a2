from __future__ import annotations

import pytest

from r1mega.benchmark.answers import answer_letter, answer_line, choice, drop_f1, same_words
from r1mega.types import Prompt


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: C", "C"),
        ("<think>Answer: A</think>so\nAnswer: B", "B"),
        ("**Answer:** (D)", "D"),
        ("answer: $A$", "A"),
        (r"The answer is \boxed{B}.", "B"),
        (r"\boxed{C) 12 m}", "C"),
        ("<think>x</think> <answer>C</answer>", "C"),
        ("答案：B", "B"),
        ("Answer: A\nno, wait.\nAnswer: C", "C"),
        ("Answer: J", "J"),
        ("<think>the answer is A", None),  # it never ended thinking
        ("Answer: Because", None),
        ("Answer: K", None),
        ("A is right", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert answer_letter(text) == letter


def test_choices_are_right_wrong_or_absent() -> None:
    prompt = Prompt(id="x", question="?", answer="C")
    assert choice(prompt, "Answer: C").value == 1.0
    assert (choice(prompt, "Answer: D").value, choice(prompt, "Answer: D").reason) == (0.0, "wrong option")
    assert choice(prompt, "the third").reason == "no answer"


@pytest.mark.parametrize(
    ("known", "text", "score"),
    [
        ("the Broncos", "Answer: Broncos", 1.0),
        ("12", "Answer: 12.0", 1.0),
        ("12 yards", "Answer: 13 yards", 0.0),  # no number shared
        ("12 yards", "Answer: 12", 2 / 3),  # precision 1, recall 1/2
        ("John Elway|Elway", "Answer: Elway", 1.0),
        ("John Elway", "Answer: Elway", 2 / 3),
        ("1,200", "Answer: 1200.", 1.0),
        ("a", "Answer: the", 1.0),
        ("red", "blue", 0.0),
    ],
)
def test_drop(known: str, text: str, score: float) -> None:
    assert drop_f1(Prompt(id="x", question="?", answer=known), text).value == pytest.approx(score)


def test_lines() -> None:
    assert answer_line("<think>Answer: 3</think>\nAnswer: **four**") == "four"
    assert answer_line("nothing") is None
    assert same_words("The Broncos.", "broncos") and not same_words("Broncos", "Bears")
