"""The pattern of R1's cold-start rows: `|special_token|<reasoning_process>|special_token|<summary>`.

A readable chain of thought, then a summary of the result (arXiv 2501.12948, section 2.3.1). Which tokens these are is
not published; R1 itself writes `<think>` and `</think>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1mega.curation.texts import CLOSE, thinking
from r1mega.data.summary import final_summary


def reasoning_and_summary(response: str) -> tuple[str, str]:
    """The two parts of a response, blanks around them left out. Raises ValueError where one of them is not there."""
    reasoning, summary = thinking(response).strip(), final_summary(response)
    if CLOSE not in response or not reasoning:
        raise ValueError(f"no thinking that ends in {CLOSE}: {response[:80]!r}")
    if not summary:
        raise ValueError(f"no summary after the thinking: {response[-80:]!r}")
    return reasoning, summary


def in_pattern(response: str, tokens: Sequence[str]) -> str:
    """The response as opening token, reasoning, closing token, summary; blanks and line breaks of the tokens stay.

    Raises ValueError where a part is not there or holds one of the tokens itself, so that nobody could part them again.
    """
    opening, closing = tokens
    reasoning, summary = reasoning_and_summary(response)
    for token in (opening, closing):
        if token.strip() in reasoning or token.strip() in summary:
            raise ValueError(f"the special token {token.strip()!r} stands in the text already: {response[:80]!r}")
    return f"{opening}{reasoning}{closing}{summary}"


def parted(text: str, tokens: Sequence[str]) -> tuple[str, str]:
    """Reasoning and summary of what `in_pattern` wrote. Raises ValueError where the text is none of that."""
    opening, closing = tokens
    if not text.startswith(opening) or closing not in text[len(opening) :]:
        raise ValueError(f"not {opening!r}<reasoning_process>{closing!r}<summary>: {text[:80]!r}")
    reasoning, _, summary = text[len(opening) :].partition(closing)
    return reasoning, summary
