"""Where the answer of a response stands: after its thinking, in `<answer>` tags where there are any."""

from __future__ import annotations


def spoken(text: str) -> str:
    """What is said after the thinking. A prompt may have opened the thinking already, so that a closing tag alone ends
    it; one that is still open runs to the end."""
    return text.rsplit("</think>", 1)[-1].split("<think>", 1)[0]


def thoughts(text: str) -> str:
    """The thinking: up to the first `</think>`, without the `<think>` that opened it. A text without either tag is all
    thinking, cut off before its end."""
    before = text.split("</think>", 1)[0]
    return before.split("<think>", 1)[-1]


def last_between(text: str, opening: str, closing: str) -> str | None:
    """What stands in the last complete pair of tags; None without one. Linear in the length of the text."""
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.index(closing, start)]


def final_part(text: str) -> str:
    """Where the answer is looked for: the last complete `<answer>...</answer>`, else all that follows the thinking."""
    tagged = last_between(text, "<answer>", "</answer>")
    return spoken(text) if tagged is None else tagged
