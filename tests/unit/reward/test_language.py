"""The share of words in the wanted language, counted by hand."""

from __future__ import annotations

import time

import pytest

from r1mega.reward.language import count_words, language_share, question_language, quick_language
from r1mega.types import Prompt


def prompt(question: str = "How many?", language: str | None = None) -> Prompt:
    return Prompt("p", question, "1", language=language)


def share(thinking: str, question: str = "How many?", language: str | None = None) -> float:
    return language_share(prompt(question, language), f"<think> {thinking} </think> <answer> 答案 </answer>").value


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("We don't know it yet.", {"en": 5}),
        ("a well-known rule", {"en": 3}),  # well, known, rule: a single letter is a symbol
        ("let x be n and f(x) = 2x", {"en": 3}),  # let, be, and
        ("今天我们计算三角形的面积", {"zh": 6}),  # 今天 我们 计算 三角形 的 面积
        ("计算 the area", {"zh": 1, "en": 2}),
        ("用Python计算面积", {"zh": 3, "en": 1}),  # 用 计算 面积
        ("Это наш ответ", {"ru": 3}),
        ("wоrd", {"other": 1}),  # the o is Cyrillic
        ("답은 둘", {"ko": 2}),
        ("こたえ", {"other": 1}),
        ("1 + 2 = 3; 42!", {}),
        ("", {}),
        ("so $x + 面积 = 计算$ is it", {"en": 3}),
        ("so \\(面积\\) and \\[计算 the area\\] end", {"en": 3}),
        ("so $$ 面积 \n\n 计算 $$ end", {"en": 2}),
        ("one \\begin{align} 面积 &= two \\end{align} three", {"en": 2}),
        ("it costs $5 and then $6 more", {"en": 5}),  # prices, not a formula
        ("run `print(面积)` now", {"en": 2}),
        ("before\n```python\n# 面积 words here\n```\nafter", {"en": 2}),
        ("before ``` never closed 面积", {"en": 1}),
        ("see https://example.org/面积 there", {"en": 2}),
        ("the answer is \\boxed{面积}", {"en": 3}),
        ("\\frac is a \\textbf{word}", {"en": 2}),  # is, word
        ("e\u0301te\u0301", {"en": 1}),
    ],
)
def test_words_by_hand(text: str, counts: dict[str, int]) -> None:
    assert count_words(text) == counts


@pytest.mark.parametrize(
    ("thinking", "question", "language", "value"),
    [
        ("We add both numbers", "How many?", None, 1.0),
        ("We add 我们 numbers", "How many?", None, 3 / 4),
        ("我们计算 the area", "三角形的面积是多少", None, 2 / 4),
        ("我们计算 the area", "三角形的面积是多少", "en", 2 / 4),
        ("我们计算面积", "How large is it?", None, 0.0),
        ("我们计算面积", "How large is it?", "zh", 1.0),
        ("We add", "$1+1$", None, 1.0),  # a question without words counts as English
        ("wоrd and word", "How many?", None, 2 / 3),
        ("$x = 1$", "How many?", None, 0.0),
        ("", "How many?", None, 0.0),
    ],
)
def test_shares_by_hand(thinking: str, question: str, language: str | None, value: float) -> None:
    assert share(thinking, question, language) == pytest.approx(value, abs=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("we think 我们 </think> words outside", 2 / 3),  # the prompt has opened the thinking
        ("<think> we think 我们", 2 / 3),  # cut off
        ("we think 我们", 2 / 3),  # opened by the prompt and cut off
        ("before <think> 我们 </think> after", 0.0),
        ("<think> we </think> <answer> 我们 </answer> <think> 我们 </think>", 1.0),
    ],
)
def test_what_the_thinking_is(text: str, value: float) -> None:
    assert language_share(prompt(), text).value == pytest.approx(value, abs=0)


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("How many?", "en"),
        ("求 $x$ 的值", "zh"),
        ("用 Python 实现 quicksort 函数", "zh"),  # 用 实现 函数 against two Latin words
        ("Translate 面积 into English", "en"),
        ("Сколько?", "ru"),
        ("12+34", "en"),
    ],
)
def test_the_language_of_a_question(question: str, language: str) -> None:
    assert question_language(question) == language


def test_reasons_and_errors() -> None:
    assert language_share(prompt(), "<think> we 我们 </think>").reason == "1 of 2 words are en"
    assert language_share(prompt(), "<think> 1 + 1 </think>").reason == "no words in the thinking"
    error = language_share(prompt(language="tlh"), "<think> nuqneH </think>").error
    assert error == "p: language: got 'tlh'; must be one of en, zh, ru, ko, ar, el, he, hi"


def test_the_quick_share_is_the_share_and_leaves_chinese_alone() -> None:
    text = "<think> We think слово </think>"
    assert quick_language(prompt(), text) == language_share(prompt(), text)
    assert quick_language(prompt(), "<think> 我们 </think>") is None
    assert quick_language(prompt("面积"), text) is None
    assert quick_language(prompt(), "word " * 10_000) is None


@pytest.mark.parametrize(
    "unit",
    ["```", "`", "$", "$$", "\\(", "\\[", "\\begin{a}", "\\begin{", "\\boxed{", "$ a", "a'", "\\", "https://", "é"],
)
def test_counting_takes_linear_time(unit: str) -> None:
    text = unit * (400_000 // len(unit))
    began = time.process_time()
    count_words(text)
    assert time.process_time() - began < 5.0  # a quadratic search would take minutes
