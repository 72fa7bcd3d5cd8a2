"""The choice reward: 1 when the option that the response names is the right one, else 0."""

from __future__ import annotations

import re

from r1mega.reward.answer import final_part
from r1mega.reward.math import last_boxed
from r1mega.types import Prompt, Score

MIN_OPTIONS, MAX_OPTIONS = 4, 8  # R1's STEM questions have 4 to 8 (arXiv 2501.12948v2, appendix B.3.1)
LETTERS = "ABCDEFGH"
NO_CHOICE = "no option is named in the answer"
MAX_ANSWER_CHARS = 4096

# simple-evals' `Answer: X`, which GPQA is read with; X may be boxed, in brackets, dollars or bold. "Answer: A or B", as
# questions put it, names none.
_ANSWER = re.compile(
    r"(?i:answer)[*_]*[ \t]*:[ \t]*[*$({\[]*(?:\\(?:boxed|text)\s*\{)*[ \t]*"
    r"([A-H](?![\w'’])|[a-h](?=[*$)}\].]*[ \t]*$))"
    r"(?![*$)}\].]*(?:[ \t]*[,/|&]|[ \t]+(?:or|and)\b)[ \t]*[*$({\[]*[A-Ha-h]\b)",
    re.MULTILINE,
)
# A letter alone, `(B)`, `B.`, `B) the second`, `Option B`.
_ALONE = re.compile(
    r"(?:(?i:option|choice)[ \t]+)?[*$({\[]*([A-Ha-h])[*$)}\].:]*(?:(?<=[).:\]])[ \t]+(\S.*))?", re.DOTALL
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")


def choice_is_right(prompt: Prompt, text: str) -> Score:
    """1 when the answer of `text` is the option that `prompt.answer` names, by its letter or its wording.

    The answer is the last `Answer: X`, else the last `\\boxed{X}`, else all that stands in the `<answer>` tags; looked
    for in these tags where there are any, and after the thinking otherwise. Fewer than 4 or more than 8 options, and a
    known answer that is none of them, give a Score with `error` set.
    """
    options = prompt.options
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        what = f"{len(options)} options; must be {MIN_OPTIONS} to {MAX_OPTIONS}"
        return Score(0.0, error=f"{prompt.id}: got {what}")
    gold = _option(prompt.answer, options)
    if gold is None:
        return Score(0.0, error=f"{prompt.id}: the known answer {prompt.answer[:80]!r} is none of the options")
    named = _named(text)
    chosen = _option(named, options) if named is not None else None
    if chosen is None:
        return Score(0.0, reason=NO_CHOICE)
    return Score(1.0) if chosen == gold else Score(0.0, reason=f"wrong option {LETTERS[chosen]}")


def _named(text: str) -> str | None:
    """The words that name the option, None where there are none."""
    part = final_part(text)
    letters = _ANSWER.findall(part)
    if letters:
        return letters[-1]
    boxed = last_boxed(part)
    if boxed is not None:
        return boxed
    # Outside of tags a letter alone may be anything.
    return part if "</answer>" in text and len(part) <= MAX_ANSWER_CHARS else None


def _option(answer: str, options: tuple[str, ...]) -> int | None:
    """The number of the option that `answer` names, from 0: by its letter, alone or before its wording, or by its
    wording. None where it names none, or a letter with another option's wording."""
    answer = _TEXT.sub(r"\1", answer).strip()
    wordings = [_plain(option) for option in options]
    letter = _ALONE.fullmatch(answer)
    if letter is not None and letter[2] is None:
        number = LETTERS.index(letter[1].upper())
        return number if number < len(options) else None
    if wordings.count(_plain(answer)) == 1:
        return wordings.index(_plain(answer))
    if letter is None:
        return None
    number = LETTERS.index(letter[1].upper())
    return number if number < len(options) and _plain(letter[2]) == wordings[number] else None


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("$.").split()).casefold()
