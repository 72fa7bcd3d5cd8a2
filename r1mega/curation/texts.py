"""What curation reads in a text: its words, its thinking, its paragraphs and its blocks of code."""

from __future__ import annotations

import re
import unicodedata

import regex

from r1mega.reward.answer import thoughts

# A Chinese character is a word, and so is a run of letters and digits of any other script; all else separates.
_WORD = regex.compile(r"\p{Han}|[\p{L}\p{M}\p{N}--\p{Han}]+", regex.VERSION1)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
OPEN, CLOSE = "<think>", "</think>"


def words(text: str) -> list[str]:
    """The words of a text, alike whatever their case, their Unicode form, and what stands between them."""
    if text.isascii():  # the same, several times as fast
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def normalised(text: str) -> str:
    """The text by its words alone: what differs in case, blanks and punctuation only is the same."""
    return " ".join(words(text))


def thinking(text: str) -> str:
    """The chain of thought: up to the first `</think>`, without the `<think>` that opened it. A prompt may have opened
    it already. A text without either tag has none."""
    return thoughts(text) if OPEN in text or CLOSE in text else ""


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph; blank lines part paragraphs."""
    return max((len(words(part)) for part in _BLANK_LINE.split(text)), default=0)


def has_code_block(text: str) -> bool:
    """Whether a line opens a fenced block."""
    return _FENCE.search(text) is not None
