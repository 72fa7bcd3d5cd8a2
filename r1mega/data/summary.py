"""The final summary of a response: what a user reads, without the thinking before it."""

from __future__ import annotations

_OPEN, _CLOSE, _ANSWER, _ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"


def final_summary(text: str, *, is_thinking: bool = False) -> str:
    """What stands after the last `</think>`, and of that what stands inside `<answer>` where there is such a tag.

    A response without thinking is its own summary. One that ends while it thinks has none: the empty text. With
    `is_thinking` the prompt has opened the thinking already, as DeepSeek-R1's chat template does.
    """
    if _CLOSE in text:
        text = text.rpartition(_CLOSE)[2]
    elif is_thinking or _OPEN in text:
        return ""
    if _ANSWER in text:
        text = text.partition(_ANSWER)[2].partition(_ANSWER_END)[0]
    return text.strip()
