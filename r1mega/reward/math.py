r"""The accuracy reward for mathematics: 1 when the response's answer equals the known one, else 0.

The comparison is math-verify's, with the known answer first: its comparison is not symmetric. It reads sets, intervals,
tuples and equations, and drops units, percent signs and currencies: `5 cm`, `5 m` and `5` are one answer to it. Plain
decimal numbers never get that far; they are compared exactly, which costs microseconds instead of milliseconds.

There is no time limit in this file. A signal-based one cannot interrupt a single long operation inside the interpreter
(`10**10**10` is one), so the limit is a process that can be killed: `r1mega.reward.pool`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from r1mega.reward.answer import last_between, spoken
from r1mega.types import Prompt, Score

MAX_ANSWER_CHARS = 4096
NO_ANSWER = "no answer"

# math-verify rounds to 6 decimals before it compares; see `_decimal`.
_MAX_DECIMALS = 6
_DECIMAL = re.compile(rf"([+-]?)([0-9]+|[0-9]{{1,3}}(?:,[0-9]{{3}})+)?(\.[0-9]{{1,{_MAX_DECIMALS}}})?")
_BRACES = re.compile(r"\\boxed\s*\{|\\.|\{|\}", re.DOTALL)
_LATEX_ENVIRONMENT = re.compile(r"\$|\\\(|\\\[|\\boxed")
_TEXT_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})?")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|exp|sqrt|mod|gcd|lcm"
_WORD = re.compile(rf"(?:^|(?<=\s))(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3,}}[.,:;!?]?(?=\s|$)")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_NEGATION = re.compile(r"(?<![a-z\\])(?:not|never|neither|nor|isn't|cannot)(?![a-z])|≠|\\neq?(?![a-z])", re.IGNORECASE)
_SEVERAL = re.compile(r"[0-9)}]\s*\b(?:or|and)\b\s*[-+$\\({]*[0-9]", re.IGNORECASE)
_BOUND = re.compile(r"^[\s$]*(?:[<>≤≥]|\\(?:[lg]eq?|[lg]t)(?![a-z]))")
# What an answer may not be unless a known one is the same.
_EVASIONS = {
    _NEGATION: "the answer says what it is not",
    _SEVERAL: "the answer names several numbers",
    _BOUND: "the answer is a bound",
}
_PERCENT = re.compile(r"\s*\\?%$")


def accuracy(prompt: Prompt, text: str) -> Score:
    """1 when the answer found in `text` equals `prompt.answer` or one of `other_answers`, else 0 with the reason.

    The answer is what stands in the last complete `<answer>...</answer>` (a `\\boxed{}` in it wins), else the last
    `\\boxed{}` outside the thinking part. A known answer may be a plain number, LaTeX, a text that holds a
    `\\boxed{}`, or a GSM8K solution that ends in `#### 1,234`. One that cannot be read gives a Score with `error`
    set: that is a fault of the data, which must not pass for a wrong response.

    May run very long on a hostile expression: call it in a `RewardPool`.
    """
    score = quick_accuracy(prompt, text)
    if score is not None:
        return score
    answer = extract_answer(text)
    assert answer is not None, "quick_accuracy decides responses without an answer"
    return _best(_compare(gold, answer) for gold in _golds(prompt))


def quick_accuracy(prompt: Prompt, text: str) -> Score | None:
    """The score of a response that can be judged at once, else None. Never slow, whatever the text.

    Decides: no answer; an answer too long to be read, in digits other than 0-9, that denies or contradicts itself; a
    known answer that is empty; two equal texts; two plain numbers.
    """
    golds = _golds(prompt)
    if not all(golds):
        return Score(0.0, error=f"{prompt.id}: the known answer {prompt.answer[-80:]!r} is empty")
    answer = extract_answer(text)
    if answer is None:
        return Score(0.0, reason=NO_ANSWER)
    if len(answer) > MAX_ANSWER_CHARS:
        return Score(0.0, reason=f"the answer has {len(answer)} characters, at most {MAX_ANSWER_CHARS} are read")
    if answer in golds:
        return Score(1.0)
    if _FOREIGN_DIGIT.search(answer):
        # Python reads every script's digits as numbers, which makes a look-alike of the answer right.
        return Score(0.0, reason="the answer has digits other than 0-9")
    for pattern, complaint in _EVASIONS.items():
        # math-verify finds the number in a sentence whatever the sentence says of it.
        if pattern.search(answer) and not any(map(pattern.search, golds)):
            return Score(0.0, reason=complaint)
    if _is_false_equation(answer):
        return Score(0.0, reason="the answer equates different numbers")
    number, known = _decimal(answer), [_decimal(gold) for gold in golds]
    if number is None or None in known:
        return None
    return Score(1.0) if number in known else Score(0.0, reason="wrong answer")


def _is_false_equation(answer: str) -> bool:
    """Whether it is `41 = 42`, of which math-verify reads the last number only."""
    sides = [_decimal(side.strip()) for side in answer.split("=")]
    return None not in sides and len(set(sides)) > 1


def _golds(prompt: Prompt) -> list[str]:
    return [gold_text(answer) for answer in (prompt.answer, *prompt.other_answers)]


def _best(scores: Iterable[Score]) -> Score:
    """The first that is right, else the first of all; but one that failed outweighs one that is wrong."""
    seen: list[Score] = []
    for score in scores:
        if score.value > 0:
            return score
        seen.append(score)
    return next((score for score in seen if score.error), seen[0])


def prepare_accuracy() -> None:
    """Import math-verify and sympy and build the parser's tables, about a second's work, ahead of the first text."""
    # The first root and the first letter load parts of sympy that fractions do without.
    _compare(r"\sqrt{7919} + x", r"\frac{15838}{2}")
    warm = _compare(r"\frac{1}{2}", "2/4")
    assert warm.value == 1.0, f"math-verify does not work as expected: {warm}"


def gold_text(answer: str) -> str:
    """The bare known answer: what follows the last `####`, else the last `\\boxed{}`, else all of it; `$` cut off."""
    if "####" in answer:
        return answer.rsplit("####", 1)[1].strip()
    boxed = last_boxed(answer)
    return _strip_dollars(answer.strip() if boxed is None else boxed)


def extract_answer(text: str) -> str | None:
    """The answer a response gives, or None. Linear in the length of the text."""
    tagged = last_between(text, "<answer>", "</answer>")
    if tagged is not None:
        boxed = last_boxed(tagged)
        return _strip_dollars(tagged.strip() if boxed is None else boxed) or None
    boxed = last_boxed(spoken(text))
    return _strip_dollars(boxed) or None if boxed is not None else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, stripped, braces matched; of nested ones the innermost."""
    depth = 0
    boxes: list[tuple[int, int]] = []  # those still open: the depth of braces outside, where the content starts
    found = (-1, -1)
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            depth = max(depth - 1, 0)
            if boxes and boxes[-1][0] == depth:
                start = boxes.pop()[1]
                # A box that closes after another one it holds began before it: the inner one stays the answer.
                if start > found[0]:
                    found = (start, match.start())
        elif token == "{":
            depth += 1
        elif token.startswith("\\boxed"):
            boxes.append((depth, match.end()))
            depth += 1
    return text[found[0] : found[1]].strip() if found[0] >= 0 else None


def _strip_dollars(text: str) -> str:
    """`$x$` and `$$x$$` without their dollars; a text of several formulas stays as it is."""
    inner = text.strip("$")
    if text.startswith("$") and text.endswith("$") and "$" not in inner:
        return inner.strip()
    return text


def _decimal(text: str) -> Decimal | None:
    """The number, when `text` is nothing but a plain decimal number, thousands commas and a currency `$` allowed.

    To compare these without sympy is sound: such a text denotes exactly one rational number, which Decimal holds and
    compares exactly. math-verify gives the same verdict, as it rounds to 6 decimals and longer fractions are left to
    it; it may only be laxer beyond 15 significant digits, where exact is right.
    """
    match = _DECIMAL.fullmatch(text.removeprefix("$").removesuffix("."))
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, fraction = match.groups(default="")
    return Decimal(f"{sign}{whole.replace(',', '')}{fraction}")


@lru_cache(maxsize=4096)
def _compare(gold: str, answer: str) -> Score:
    """The verdict of math-verify. Cached: the samples of one prompt often give the same answer."""
    from math_verify import verify

    try:
        gold_expressions = _read(gold)
    except Exception as error:  # whatever the parser stumbles over is a fault of the data, and is reported as such
        return Score(0.0, error=f"the known answer {gold[:80]!r} cannot be read ({type(error).__name__})")
    if not gold_expressions:
        return Score(0.0, error=f"the known answer {gold[:80]!r} cannot be read as mathematics")
    try:
        expressions = _read(answer)
        right = bool(expressions) and verify(gold_expressions, expressions, timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # sympy raises nearly anything on expressions nobody wrote on purpose
        return Score(0.0, reason=f"the answer cannot be compared ({type(error).__name__})")
    if not expressions:
        return Score(0.0, reason="the answer cannot be read as mathematics")
    return Score(1.0) if right else Score(0.0, reason="wrong answer")


def _read(text: str) -> list[Any]:
    """The sympy expressions math-verify reads from `text`; empty when it understands none."""
    percent = _PERCENT.search(text)
    if _LATEX_ENVIRONMENT.search(text.removeprefix("$").removeprefix("\\$")):
        return _parse(text)
    if percent:
        return _parse(f"${text[: percent.start()]}%$")
    # LaTeX reads words as products of letters, so a sentence is searched for its number first.
    sentence = _parse(text) if _WORD.search(_TEXT_COMMAND.sub("", text)) else []
    return sentence or _parse(f"\\boxed{{{text.replace('**', '^').removesuffix('.')}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    _quieten()
    config = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(text, extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)


@lru_cache(maxsize=1)
def _quieten() -> None:
    """math-verify warns once a process when its own time limit is off; the pool is the limit here."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
