"""What a kept response must be: right, whole, well-formed, and readable in its chain of thought.

DeepSeek-R1 keeps the correct samples and leaves out chains of thought of mixed languages, with long paragraphs, and
with code blocks (arXiv 2501.12948, section 2.3.3). Where the lines are drawn is not published: every limit is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from r1mega.curation.texts import CLOSE, OPEN, has_code_block, longest_paragraph, thinking, words
from r1mega.data.summary import final_summary
from r1mega.reward.format import r1_zero_format
from r1mega.reward.language import count_words, language_share
from r1mega.reward.repetition import repetition_penalty
from r1mega.types import Prompt, is_right

FORMS = ("any", "think", "r1_zero")


@dataclass(frozen=True)
class Candidate:
    """One scored response. `parts` are the values of the rewards by name; `tokens` its length, by which the shortest
    is told. `given` marks a row that nobody sampled."""

    prompt_id: str
    sample: int
    prompt: str
    response: str
    domain: str = "math"
    language: str | None = None
    tokens: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    cut_off: bool = False
    given: bool = False


@dataclass(frozen=True)
class Limits:
    """What a response must keep; the defaults let everything through that is right and whole.

    Args:
        form: one of FORMS. `think`: thinking that ends in `</think>`, then a summary; `r1_zero`: the format that
            R1-Zero is rewarded for; `any`: not blank.
        min_language: least share of the words of the thinking that are in the wanted language, 0 .. 1.
        max_paragraph_words: of the thinking's longest paragraph; 0 takes any.
        code_blocks: whether the thinking may hold fenced code.
        max_repetition: largest share of passages that stood there before (r1mega.reward.repetition), 0 .. 1.
        min_thinking_words: of the whole chain of thought.
        special_tokens: what the thinking is put between later (r1mega.curation.patterns), which it must not hold yet.
    """

    form: str = "any"
    min_language: float = 0.0
    max_paragraph_words: int = 0
    code_blocks: bool = True
    max_repetition: float = 1.0
    min_thinking_words: int = 0
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: got {self.form!r}; must be one of {', '.join(FORMS)}")


# A filter says whether a candidate passes; None where it has nothing to say of it.
Filter = Callable[[Candidate, Limits], bool | None]


def was_right(one: Candidate, limits: Limits) -> bool | None:
    """See r1mega.types.is_right."""
    return is_right(one.parts)


def is_well_formed(one: Candidate, limits: Limits) -> bool | None:
    """Whether the response has the wanted form."""
    text = one.response
    if not text.strip():
        return False
    if limits.form == "any":
        return None
    if limits.form == "r1_zero":
        return r1_zero_format(_prompt(one), text).value == 1.0
    opened = text.count(OPEN)
    if text.count(CLOSE) != 1 or opened > 1 or (opened and not text.lstrip().startswith(OPEN)):
        return False
    return bool(thinking(text).strip()) and bool(final_summary(text))


def is_in_one_language(one: Candidate, limits: Limits) -> bool | None:
    """Whether enough words of the thinking are in the wanted language; None where the thinking has no words."""
    chain = thinking(one.response)
    if not limits.min_language or not chain.strip():
        return None
    share = one.parts.get("language")
    if share is None:
        share = language_share(_prompt(one), one.response).value
    if share >= limits.min_language:
        return True
    return False if share or count_words(chain) else None


def has_short_paragraphs(one: Candidate, limits: Limits) -> bool | None:
    """Whether no paragraph of the thinking is too long."""
    limit = limits.max_paragraph_words
    return longest_paragraph(thinking(one.response)) <= limit if limit else None


def has_no_code_block(one: Candidate, limits: Limits) -> bool | None:
    """Whether the thinking is free of fenced code."""
    return None if limits.code_blocks else not has_code_block(thinking(one.response))


def repeats_little(one: Candidate, limits: Limits) -> bool | None:
    """Whether few enough passages stood there before."""
    if limits.max_repetition >= 1:
        return None
    penalty = one.parts.get("repetition")
    if penalty is None:
        penalty = repetition_penalty(_prompt(one), one.response).value
    return -penalty <= limits.max_repetition


def thinks_long(one: Candidate, limits: Limits) -> bool | None:
    """Whether the chain of thought is long enough."""
    return len(words(thinking(one.response))) >= limits.min_thinking_words if limits.min_thinking_words else None


def holds_no_special_token(one: Candidate, limits: Limits) -> bool | None:
    """Whether the parts between which special tokens are put are free of them."""
    if not limits.special_tokens:
        return None
    parts = (thinking(one.response), final_summary(one.response))
    return not any(token.strip() in part for token in limits.special_tokens for part in parts)


# By the name that a dropped sample is counted under, in the order asked. The cheap and the decisive come first.
FILTERS: dict[str, Filter] = {
    "failed": lambda one, limits: one.error is None,
    "cut_off": lambda one, limits: not one.cut_off,
    "wrong": was_right,
    "malformed": is_well_formed,
    "mixed_language": is_in_one_language,
    "long_paragraph": has_short_paragraphs,
    "code_block": has_no_code_block,
    "repetition": repeats_little,
    "short_thinking": thinks_long,
    "special_token": holds_no_special_token,
}
# What nobody sampled was not scored either, and has no chain of thought where it needs none.
_OF_GIVEN = ("malformed",)


def sieve(one: Candidate, limits: Limits) -> tuple[str | None, tuple[str, ...]]:
    """(the first reason to drop it, None where there is none; the filters that it has passed)."""
    passed = []
    for name, passes in FILTERS.items():
        if one.given and name not in _OF_GIVEN:
            continue
        verdict = bool(one.response.strip()) if one.given else passes(one, limits)
        if verdict is False:
            return name, tuple(passed)
        if verdict:
            passed.append(name)
    return None, tuple(passed)


def _prompt(one: Candidate) -> Prompt:
    return Prompt(one.prompt_id, one.prompt, "", language=one.language)
