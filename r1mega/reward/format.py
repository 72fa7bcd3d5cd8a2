"""The format reward of R1-Zero: thinking between `<think>` tags, then the answer between `<answer>` tags, nothing else.

arXiv 2501.12948, section 2.2: "format rewards ... enforces the model to put its thinking process between <think> and
</think> tags". The authors' own matcher is not published; this one asks for what their prompt (Table 1) shows.
"""

from __future__ import annotations

import re

from r1mega.types import Prompt, Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SPLIT = re.compile("|".join(TAGS))


def r1_zero_format(prompt: Prompt, text: str) -> Score:
    """1 when `text` is `<think> ... </think> <answer> ... </answer>`, else 0 with the reason.

    Each tag stands exactly once and in this order; both parts hold more than whitespace; outside is whitespace only.
    """
    found = tuple(_SPLIT.findall(text))
    if found != TAGS:
        return Score(0.0, reason=_wrong_tags(found))
    before, thinking, between, answer, after = _SPLIT.split(text)
    for part, name in ((thinking, "<think>"), (answer, "<answer>")):
        if not part.strip():
            return Score(0.0, reason=f"nothing between {name} and {name.replace('<', '</')}")
    outside = {"before <think>": before, "between </think> and <answer>": between, "after </answer>": after}
    for place, part in outside.items():
        if part.strip():
            return Score(0.0, reason=f"text {place}")
    return Score(1.0)


def _wrong_tags(found: tuple[str, ...]) -> str:
    for tag in TAGS:
        if found.count(tag) != 1:
            return f"{tag} appears {found.count(tag)} times, once is expected"
    return "tags in the wrong order"
