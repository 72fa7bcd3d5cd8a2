from __future__ import annotations

import pytest

from r1mega.curation import texts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's 3.5 km, OK?", ["it", "s", "3", "5", "km", "ok"]),
        ("ＡＢ Ｃ１", ["ab", "c1"]),  # full-width letters are the same letters
        ("我们 go吧", ["我", "们", "go", "吧"]),
        ("x = \\frac{1}{2}", ["x", "frac", "1", "2"]),
        ("+-*", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert texts.words(text) == found


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("<think>a b</think> c", "a b"),
        ("a b</think> c", "a b"),  # the prompt has opened it
        ("<think>a b", "a b"),  # cut off
        ("c", ""),
        ("c </think> d <think> e", "c "),
    ],
)
def test_thinking(text: str, chain: str) -> None:
    assert texts.thinking(text) == chain


def test_paragraphs_and_code() -> None:
    assert texts.longest_paragraph("one two\nthree\n \nfour") == 3
    assert texts.longest_paragraph("") == 0
    assert texts.has_code_block("so\n  ```python\nx\n```") and texts.has_code_block("~~~\nx")
    assert not texts.has_code_block("the mark ``` inside a line, and `x`")


def test_the_quick_way_finds_the_same_words() -> None:
    for text in ("It's 3.5 km_h, OK? x_1 := 'A-b'\t\n", "".join(map(chr, range(128)))):
        assert texts.words(text) == texts.words(text + "\u2014")  # a dash that is not ASCII
