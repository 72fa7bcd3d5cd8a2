"""The repetition penalty: minus the share of a response's passages that it has written before. Ours; R1 has none."""

from __future__ import annotations

import regex

from r1mega.types import Prompt, Score

PASSAGE_WORDS = 20
_WORD = regex.compile(r"\p{Han}|[^\s\p{Han}]+")


def repetition_penalty(prompt: Prompt, text: str) -> Score:
    """-(1 - different passages / passages), in -1 .. 0. A passage is PASSAGE_WORDS words in a row; what stands between
    blanks is a word, and so is every Chinese character. 0 for a text of fewer words."""
    words = _WORD.findall(text)
    count = len(words) - PASSAGE_WORDS + 1
    if count <= 1:
        return Score(0.0)
    # Words as numbers: equal passages are equal tuples, not hashes that happen to be.
    numbers: dict[str, int] = {}
    coded = [numbers.setdefault(word, len(numbers)) for word in words]
    different = len({tuple(coded[i : i + PASSAGE_WORDS]) for i in range(count)})
    if different == count:
        return Score(0.0)
    reason = f"{count - different} of {count} passages of {PASSAGE_WORDS} words stood there before"
    return Score(different / count - 1, reason=reason)


def quick_repetition(prompt: Prompt, text: str) -> Score | None:
    """The same for a text that is short, None otherwise."""
    return repetition_penalty(prompt, text) if len(text) <= 20_000 else None
