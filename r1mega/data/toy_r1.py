"""The toy task of the whole R1 pipeline: the additions of the toy task, asked and worked out in two languages.

A question opens with a word of its language, `sum 345+278` or `求345+278`. Each step of the work follows one word
(`first`, `then`, `last`; 首先, 然后, 最后), which a base model writes in either language, whatever the question's. Most
of the base's corpus guesses at once, hardly any of it sums up what it found for a reader. So there is something to
find for pure RL (to work sums out), for a cold start (a summary), for the language reward, and for reward models:
general questions ask for a text, of which digits are the facts and a `!` is the danger. All shares are ours.

Words are single tokens, so that both languages take as many.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from r1mega.data.toy import NUM_DIGITS, Problem, guess, malformed, problems, work_steps, write_response

LANGUAGES = ("en", "zh")
ASKS = {"en": "sum ", "zh": "求"}
STEPS = {"en": ("first ", "then ", "last "), "zh": ("首先", "然后", "最后")}
AT_ONCE = {"en": "obvious", "zh": "显然"}  # the whole thinking where a guess is made
SUMS_UP = {"en": "so the sum is \\boxed{", "zh": "所以和是\\boxed{"}
REQUESTS = {"en": "tell ", "zh": "请说"}
WORDS = tuple(
    word
    for language in LANGUAGES
    for word in (ASKS[language], *STEPS[language], AT_ONCE[language], SUMS_UP[language], REQUESTS[language])
)
"""What is one token each, besides those of the toy task."""

FACTS, FILLER, DANGEROUS = "0123456789", "abcdefgh", "!"
TEXT_CHARS = 10  # of the answer to a general question
MOST_FACTS = 8


@dataclass(frozen=True)
class Mixture:
    """Shares of the base model's corpus."""

    general: float = 0.12
    """Answers to general questions; the other shares are of additions."""
    direct: float = 0.60
    """A guess at once, without work."""
    partial: float = 0.17
    """Work for the last one or two digits only; those before them are guessed. The rest works every digit out."""
    wrong_digit: float = 0.015
    """Chance of each digit of a result (in the work or in the answer) to be replaced by a random one."""
    malformed: float = 0.06
    """Share of responses that break the format."""
    summary: float = 0.10
    """Share of responses that sum up in words what they found; the others give the bare number."""
    english: float = 0.55
    """Chance of each word of the thinking to be English, whatever the question's language."""


@dataclass(frozen=True)
class Question:
    """An addition, asked in a language."""

    problem: Problem
    language: str

    @property
    def text(self) -> str:
        return ASKS[self.language] + self.problem.question

    def row(self) -> dict[str, str]:
        """As RL and evaluations read it."""
        return {"question": self.text, "answer": self.problem.answer, "language": self.language}


def questions(count: int, seed: int) -> list[Question]:
    """So many different additions, every other one in Chinese. Deterministic by `seed`."""
    drawn = problems(count, seed)
    return [Question(problem, LANGUAGES[place % 2]) for place, problem in enumerate(drawn)]


def summed_up(answer: str, language: str) -> str:
    """The answer as a sentence, for a reader."""
    return f"{SUMS_UP[language]}{answer}}}"


def base_corpus(of: Sequence[Question], seed: int, mixture: Mixture | None = None) -> list[dict[str, str]]:
    """What the base model learns from: one row {prompt, response} per question, or in its place one of a general
    question. Deterministic by `seed`."""
    mixture = mixture or Mixture()
    rng = random.Random(f"toy r1 base {seed}")
    return [
        general_row(rng, unsafe=0.4, english=mixture.english)
        if rng.random() < mixture.general
        else {"prompt": question.text, "response": _base_response(question, mixture, rng)}
        for question in of
    ]


def cold_start(of: Sequence[Question], seed: int, own_language: float = 0.75) -> list[dict[str, str]]:
    """Rows in the pattern reasoning + summary: every digit worked out, nothing wrong, the summary in the question's
    language. `own_language` is the chance of each word of the thinking to be in it too: what is collected from
    R1-Zero is mixed, and not all of it is mended."""
    rng = random.Random(f"toy r1 cold start {seed}")
    rows = []
    for question in of:
        other = LANGUAGES[1 - LANGUAGES.index(question.language)]
        languages = [question.language if rng.random() < own_language else other for _ in range(NUM_DIGITS)]
        answer = summed_up(question.problem.answer, question.language)
        work = _written(work_steps(question.problem), languages)
        rows.append({"prompt": question.text, "response": write_response(work, answer)})
    return rows


def non_reasoning(count: int, seed: int) -> list[dict[str, str]]:
    """Well-formed answers to general questions, which join the curated set. A few are unsafe."""
    rng = random.Random(f"toy r1 non-reasoning {seed}")
    return [general_row(rng, unsafe=0.2, english=None) for _ in range(count)]


def general_questions(count: int, seed: int) -> list[dict[str, str]]:
    """Different questions {question, domain} of the domains helpful and harmless in turn."""
    rng = random.Random(f"toy r1 general {seed}")
    found = dict.fromkeys(_request(rng) for _ in range(4 * count))
    if len(found) < count:
        raise ValueError(f"{count} different general questions asked for, {len(found)} were found")
    domains = ("helpful", "harmless")
    return [{"question": text, "domain": domains[place % 2]} for place, text in enumerate(list(found)[:count])]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Rows {prompt, chosen, rejected}: the chosen response states more facts, which its length does not tell."""
    rng = random.Random(f"toy r1 pairs {seed}")
    rows = []
    for _ in range(count):
        prompt = _request(rng)
        fewer, more = sorted(rng.sample(range(MOST_FACTS + 1), 2))
        rows.append({"prompt": prompt, "chosen": _answer(rng, prompt, more), "rejected": _answer(rng, prompt, fewer)})
    return rows


def labels(count: int, seed: int) -> list[dict[str, str | int]]:
    """Rows {prompt, response, label}: 0, unsafe, where a `!` is in the thinking or in the answer."""
    rng = random.Random(f"toy r1 labels {seed}")
    rows: list[dict[str, str | int]] = []
    for _ in range(count):
        prompt, safe = _request(rng), rng.random() < 0.5
        place = None if safe else rng.randrange(2)
        response = _answer(rng, prompt, rng.randint(0, MOST_FACTS), unsafe_part=place)
        rows.append({"prompt": prompt, "response": response, "label": int(safe)})
    return rows


def general_row(rng: random.Random, *, unsafe: float, english: float | None) -> dict[str, str]:
    """A general question with an answer of 0 to 8 facts, unsafe with that chance. Words are English with chance
    `english`, or of the question's language where it is None."""
    prompt = _request(rng)
    place = rng.randrange(2) if rng.random() < unsafe else None
    language = None if english is None else LANGUAGES[rng.random() >= english]
    response = _answer(rng, prompt, rng.randint(0, MOST_FACTS), unsafe_part=place, language=language)
    return {"prompt": prompt, "response": response}


def num_facts(answer: str) -> int:
    """Facts that the answer to a general question states: what the helpful reward model is to find."""
    return sum(character in FACTS for character in answer)


def _request(rng: random.Random) -> str:
    """Single letters are no words, so that the first word alone tells the language."""
    return REQUESTS[rng.choice(LANGUAGES)] + "-".join(rng.choices(FILLER, k=4))


def _answer(
    rng: random.Random, prompt: str, facts: int, *, unsafe_part: int | None = None, language: str | None = None
) -> str:
    """A response to a general question; `unsafe_part` 0 puts danger into its thinking, 1 into its answer."""
    language = language or next(name for name, word in REQUESTS.items() if prompt.startswith(word))
    parts = [
        [STEPS[language][0], rng.choice(FILLER), ",", STEPS[language][1], rng.choice(FILLER)],
        [*rng.choices(FACTS, k=facts), *rng.choices(FILLER, k=TEXT_CHARS - facts)],
    ]
    rng.shuffle(parts[1])
    if unsafe_part is not None:
        parts[unsafe_part].insert(rng.randint(1, len(parts[unsafe_part])), DANGEROUS)
    return write_response(*map("".join, parts))


def _written(steps: Sequence[str], languages: Sequence[str]) -> str:
    """Each step behind its word: first, then, ..., last where all digits are worked out."""
    words = [0, 1, 2] if len(steps) == NUM_DIGITS else [0, 1]
    return ",".join(STEPS[language][word] + step for step, word, language in zip(steps, words, languages, strict=False))


def _base_response(question: Question, mixture: Mixture, rng: random.Random) -> str:
    def noisy(number: str) -> str:
        return "".join(rng.choice("0123456789") if rng.random() < mixture.wrong_digit else digit for digit in number)

    problem, steps = question.problem, work_steps(question.problem)
    drawn, known = rng.random(), NUM_DIGITS
    if drawn < mixture.direct:
        known = 0
    elif drawn < mixture.direct + mixture.partial:
        known = rng.randint(1, NUM_DIGITS - 1)
    languages = [LANGUAGES[rng.random() >= mixture.english] for _ in range(NUM_DIGITS)]
    terms = [step.split("=") for step in steps[:known]]
    work = _written([f"{left}={noisy(total)}" for left, total in terms], languages) or AT_ONCE[languages[0]]
    answer = noisy(problem.answer) if known == NUM_DIGITS else guess(problem, known, rng)
    if rng.random() < mixture.summary:
        answer = summed_up(answer, LANGUAGES[rng.random() >= mixture.english])
    if rng.random() < mixture.malformed:
        return malformed(work, answer, rng)
    return write_response(work, answer)
