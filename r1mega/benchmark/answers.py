"""The answer that a response gives, by kind of question; and the graders that need no more than it.

Only what follows the thinking counts: what stands after the last `</think>`, where there is one.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from r1mega.reward.answer import spoken
from r1mega.reward.math import extract_answer, last_boxed
from r1mega.types import Prompt, Score

LETTERS = string.ascii_uppercase[:10]
NO_ANSWER = "no answer"
ALTERNATIVE = "|"  # between the known answers of a DROP question, any of which is right
# As simple-evals asks for it ("Answer: $LETTER"), with what models put around the letter. The last one counts.
_LETTER_LINE = re.compile(
    rf"(?i:answer|答案)[ \t*]*(?:(?i:is)|[:：]|是|为)[ \t*$(（]*(?:\\boxed\s*\{{)?\s*([{LETTERS}])\b"
)
_LETTER = re.compile(rf"\W*([{LETTERS}])(?:\W.*)?", re.DOTALL)
_TEXT_LINE = re.compile(r"(?i:answer)[ \t*]*[:：][ \t*]*(.+)")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def answer_letter(text: str) -> str | None:
    """The option chosen: the last `Answer: X`, else the letter in the last `\\boxed{}` or between answer tags."""
    said = spoken(text)
    lines = _LETTER_LINE.findall(said)
    if lines:
        return lines[-1]
    inner = extract_answer(text)
    match = _LETTER.fullmatch(inner) if inner is not None else None
    return match[1] if match else None


def choice(prompt: Prompt, text: str) -> Score:
    """1 where the option chosen is `prompt.answer`, a letter, else 0 with the reason."""
    letter = answer_letter(text)
    if letter is None:
        return Score(0.0, reason=NO_ANSWER)
    return Score(1.0) if letter == prompt.answer.strip() else Score(0.0, reason="wrong option")


def answer_line(text: str) -> str | None:
    """A short answer in words: the last `Answer: ...`, else what stands between answer tags or in a box."""
    lines = _TEXT_LINE.findall(spoken(text))
    found = lines[-1].strip().rstrip("*").strip() if lines else extract_answer(text)
    boxed = last_boxed(found) if found else None
    return boxed or found or None


def drop_f1(prompt: Prompt, text: str) -> Score:
    """F1 of the words of the answer against those of the known one, the best of several known ones.

    Words as DROP's own scorer has them (Dua et al. 2019, arXiv 1903.00161): lower case, no articles, no punctuation,
    numbers by value; where the known answer has numbers and the given one shares none of them, 0. An answer of several
    spans is compared as one bag of words.
    """
    answer = answer_line(text)
    if answer is None:
        return Score(0.0, reason=NO_ANSWER)
    given = _words(answer)
    return Score(max(_f1(given, _words(known)) for known in prompt.answer.split(ALTERNATIVE)))


def same_words(first: str, second: str) -> bool:
    """Whether two short answers are the same but for case, articles and punctuation."""
    return _words(first) == _words(second)


def _f1(given: Counter[str], known: Counter[str]) -> float:
    numbers = {word for word in known if _is_number(word)}
    if numbers and not numbers & set(given):
        return 0.0
    shared = sum((given & known).values())
    if not shared:
        return float(not given and not known)
    precision, recall = shared / sum(given.values()), shared / sum(known.values())
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> Counter[str]:
    parts = re.split(r"[\s-]+", _ARTICLE.sub(" ", text.lower()))
    return Counter(word for word in map(_word, parts) if word)


def _word(part: str) -> str:
    plain = part.strip(string.punctuation).replace(",", "")
    if _is_number(plain):
        return str(float(plain))
    return "".join(letter for letter in part if letter not in string.punctuation)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
