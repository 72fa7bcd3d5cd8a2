from __future__ import annotations

import pytest

from r1mega.curation.patterns import in_pattern, parted

TOKENS = ["|special_token|", "|special_token|"]


def test_the_pattern_of_the_paper() -> None:
    for response in ("<think> a\n\nb </think> c.", " a\n\nb</think>\nc."):
        assert in_pattern(response, TOKENS) == "|special_token|a\n\nb|special_token|c."
    zero = "<think>a</think> <answer> 42 </answer>"
    assert in_pattern(zero, ["<think>\n", "\n</think>\n\n"]) == "<think>\na\n</think>\n\n42"


def test_it_can_be_parted_again() -> None:
    text = in_pattern("<think>x + 1</think> two", TOKENS)
    assert parted(text, TOKENS) == ("x + 1", "two")
    with pytest.raises(ValueError, match="not '.special_token.'<reasoning_process>"):
        parted("x + 1", TOKENS)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("no thinking", "no thinking that ends in </think>"),
        ("<think>cut off", "no thinking that ends in </think>"),
        ("<think> </think> c", "no thinking"),
        ("<think>a</think> ", "no summary after the thinking"),
        ("<think>a |special_token| b</think> c", "stands in the text already"),
        ("<think>a</think> c|special_token|", "stands in the text already"),
    ],
)
def test_what_has_no_two_parts_is_refused(response: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        in_pattern(response, TOKENS)
