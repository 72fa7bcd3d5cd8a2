"""The accuracy reward: which text is the answer, what the known answer is, and when the two are equal."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.reward.math import (
    MAX_ANSWER_CHARS,
    NO_ANSWER,
    _compare,
    accuracy,
    extract_answer,
    gold_text,
    last_boxed,
    quick_accuracy,
)
from r1mega.types import Prompt, Score


def score(gold: str, text: str) -> Score:
    return accuracy(Prompt(id="p", question="?", answer=gold), text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> x </think> <answer> 42 </answer>", "42"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1</answer> and <answer>2", "1"),  # the last one is not complete
        ("<answer>1</answer> rest </answer>", "1"),
        ("<answer><answer>3</answer>", "3"),
        (r"<answer> it is \boxed{7} metres </answer>", "7"),
        (r"\boxed{1} <answer> 8 </answer>", "8"),
        (r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think> \boxed{1} </think> \boxed{2}", "2"),
        (r"\boxed{2} <think> \boxed{1}", "2"),
        (r"the prompt opened it: \boxed{1} </think> \boxed{2}", "2"),
        (r"\boxed{$5$}", "5"),
        (r"<think> \boxed{1} </think> done", None),
        (r"<think> \boxed{1}", None),
        (r"<answer></answer>", None),
        (r"\boxed{}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_which_text_is_the_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"} { \boxed{3}", "3"),
        (r"\boxed{3", None),
        ("{3}", None),
    ],
)
def test_the_last_complete_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("72", "72"),
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,234", "1,234"),
        (r"Therefore the sum is $\boxed{\frac{9}{256}}$.", r"\frac{9}{256}"),
        (r"$\frac12$", r"\frac12"),
        ("$1$ or $2$", "$1$ or $2$"),
    ],
)
def test_what_the_known_answer_is(answer: str, gold: str) -> None:
    assert gold_text(answer) == gold


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42"),
        ("x\n#### 1,234", "1234"),
        ("1234", "1,234.0"),
        ("18", "$18"),
        ("18", "18."),
        ("18", "18 dollars"),
        ("18", "The total is 18 dollars."),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "3/6"),
        (r"\frac{1}{2}", r"$\frac{2}{4}$"),
        ("1000", "10**3"),
        ("5", "x = 5"),
        (r"x^2+2x+1", "(x+1)^2"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"(3, \frac{\pi}{2})", r"(3, \pi/2)"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("10%", r"10\%"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1, 2", "2, 1"),
        ("[1, 2)", r"\left[1, 2\right)"),
        (r"5\text{ cm}", "5 cm"),
        ("5", r"5\text{ cm}"),
        (r"90^\circ", "90"),
        ("42", "42 = 42"),
        ("x > 42", "x > 42 "),
        ("3 or 4", "3 or 4 "),
    ],
)
def test_equal_answers(gold: str, answer: str) -> None:
    assert score(gold, f"<answer> {answer} </answer>").value == 1.0
    assert score(gold, rf"\boxed{{{answer}}}").value == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("42", "420"),
        ("42", "42+"),
        ("42", "4 2"),
        ("2", "sqrt(2)"),
        ("1000", "10**2"),
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        ("x^2", "x^3"),
        (r"\text{Evelyn}", r"\text{Evan}"),
        ("(3, 4)", "(4, 3)"),
        ("5", "five apples"),
        ("5", "{"),
        ("5", "10**10**10"),
        (r"\{1, 2\}", r"\{1, 2, 3\}"),
        ("(1, 2)", "[1, 2]"),
        ("42", "41, 42"),
        ("42", "41 or 42"),
        ("42", "41 = 42"),
        ("42", "not 42"),
        ("42", "> 42"),
        ("42", r"\le 42"),
        ("42", "43 and 42"),
        ("42", r"x \neq 42"),
        ("42", "\u0664\u0662"),
        ("42", "\uff14\uff12"),
    ],
)
def test_different_answers(gold: str, answer: str) -> None:
    got = score(gold, f"<answer> {answer} </answer>")
    assert got.value == 0.0
    assert got.reason
    assert got.error is None


def test_a_response_without_an_answer() -> None:
    assert score("5", "it is 5") == Score(0.0, reason=NO_ANSWER)


def test_an_endless_answer_is_not_read() -> None:
    got = score("5", f"<answer> {'1+' * MAX_ANSWER_CHARS}1 </answer>")
    assert got.value == 0.0
    assert str(MAX_ANSWER_CHARS) in got.reason


@pytest.mark.parametrize(("answer", "value"), [("4/8", 1.0), ("3", 1.0), ("3/1", 1.0), ("4", 0.0), ("2/8", 0.0)])
def test_several_known_answers(answer: str, value: float) -> None:
    prompt = Prompt("p", "?", "3", other_answers=(r"\frac{1}{2}",))
    assert accuracy(prompt, f"<answer> {answer} </answer>").value == value


def test_one_of_several_known_answers_that_cannot_be_read() -> None:
    prompt = Prompt("p", "?", "???", other_answers=("3",))
    assert accuracy(prompt, "<answer> 3/1 </answer>").value == 1.0
    assert "cannot be read" in accuracy(prompt, "<answer> 4/1 </answer>").error


@pytest.mark.parametrize("gold", ["???", r"\frac{", "####", "  "])
def test_an_unreadable_known_answer_is_an_error_of_the_data(gold: str) -> None:
    got = score(gold, "<answer> 5/3 </answer>")
    assert got.error is not None
    assert "known answer" in got.error


numbers = st.decimals(allow_nan=False, allow_infinity=False, min_value=-9999, max_value=9999, places=3)


@settings(max_examples=60, deadline=None)
@given(gold=numbers, other=numbers)
def test_the_quick_verdict_on_numbers_is_math_verifys(gold, other) -> None:
    for text in (str(other), str(gold), f"{gold}00", f"{gold:f}"):
        quick = quick_accuracy(Prompt(id="p", question="?", answer=str(gold)), f"<answer>{text}</answer>")
        assert quick is not None
        assert quick.value == _compare(str(gold), text).value


def test_the_quick_verdict_leaves_alone_what_it_cannot_decide() -> None:
    for gold, answer in (("1/2", "0.5"), ("0.5", "1/2"), ("0.333333", "0.3333334"), ("1234", "12,34")):
        prompt = Prompt(id="p", question="?", answer=gold)
        assert quick_accuracy(prompt, f"<answer>{answer}</answer>") is None


@pytest.mark.parametrize(
    "unit", ["<answer>", "</answer>", r"\boxed{", "{", "}", "<think>", "</think>", "\\", "$", r"\boxed{1}"]
)
def test_finding_the_answer_takes_linear_time(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    began = time.process_time()
    extract_answer(text + "<answer>" + text)
    assert time.process_time() - began < 2.0  # quadratic search would take minutes


def golds(folder: Path, name: str) -> list[str]:
    with (folder / name).open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


SETS = ("math500_dev.jsonl", "gsm8k_test_dev.jsonl", "aime2024.jsonl")


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, 60) for name in SETS] + [pytest.param(name, None, marks=pytest.mark.extended) for name in SETS],
)
def test_known_answers_equal_themselves_and_not_each_other(shared_data: Path, name: str, count: int | None) -> None:
    """At least 99.5% equal to themselves, compared in full too; at most 0.5% to another problem's different answer."""
    known = golds(shared_data, name)[:count]
    texts = [gold_text(answer) for answer in known]
    unequal, equal, others = [], [], 0
    for i, (answer, text) in enumerate(zip(known, texts, strict=True)):
        verdicts = [
            score(answer, f"<think> x </think> <answer> {text} </answer>"),
            score(answer, rf"<think> x </think> It is $\boxed{{{text}}}$."),
            _compare(text, f"{text} "),  # the space makes the text differ, so that math-verify is asked
        ]
        unequal += [(answer[-80:], verdict) for verdict in verdicts if verdict.value != 1.0]
        for step in (1, 7, 23):
            other = texts[(i + step) % len(texts)]
            if other != text:
                others += 1
                if score(answer, f"<answer> {other} </answer>").value != 0.0:
                    equal.append((text, other))
    print(f"{name}: {len(unequal)} of {3 * len(known)} not equal to themselves: {unequal}")
    print(f"{name}: {len(equal)} of {others} equal to another problem's answer: {equal}")
    assert len(unequal) <= 0.005 * 3 * len(known)
    assert len(equal) <= 0.005 * others


@pytest.mark.extended
def test_all_of_gsm8k_train(shared_data: Path) -> None:
    known = golds(shared_data, "gsm8k_train.jsonl")
    texts = [gold_text(answer) for answer in known]
    right = sum(score(gold, rf"\boxed{{{text}}}").value for gold, text in zip(known, texts, strict=True))
    wrong = [
        (text, other)
        for gold, text, other in zip(known, texts, texts[1:] + texts[:1], strict=True)
        if text != other and score(gold, f"<answer> {other} </answer>").value
    ]
    print(f"{right:.0f} of {len(known)} equal to themselves; equal to their neighbours: {wrong}")
    assert right >= 0.995 * len(known)
    assert len(wrong) <= 0.005 * len(known)
