"""The toy task: adding two 3-digit numbers, with the work written digit by digit inside `<think>`.

The corpus of the base model adds rightly where the work is written out, but mostly answers at once, and then guesses.
So the base has the skill and rarely uses it, which is what reinforcement learning then finds. The shares below are
chosen so that about a quarter of the base model's samples are right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_DIGITS = 3
NO_WORK = "."  # what stands in the thinking part when the answer is given at once; the format wants it filled


@dataclass(frozen=True)
class Mixture:
    """Shares of the base model's corpus. The shares of work styles add up to 1."""

    direct: float = 0.60
    """A guess at once, without work."""
    partial: float = 0.16
    """Work for the last one or two digits only; those before them are guessed."""
    full: float = 0.19
    """Work for every digit."""
    twice: float = 0.05
    """Work for every digit, written two times."""
    wrong_digit: float = 0.01
    """Chance of each digit of a result (in the work or in the answer) to be replaced by a random one."""
    malformed: float = 0.06
    """Share of responses that break the format."""

    def __post_init__(self) -> None:
        total = self.direct + self.partial + self.full + self.twice
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the shares of direct, partial, full and twice must add up to 1, got {total}")


@dataclass(frozen=True)
class Problem:
    """`left` + `right`, both of 3 digits."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"{self.left}+{self.right}"

    @property
    def answer(self) -> str:
        return str(self.left + self.right)


def problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems, no two with the same operands in either order. Deterministic by `seed`."""
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS
    available = (high - low) * (high - low + 1) // 2
    if count > available // 2:
        raise ValueError(f"{count} different problems asked for, at most {available // 2} are given out")
    rng = random.Random(f"toy problems {seed}")
    seen: set[tuple[int, int]] = set()
    found: list[Problem] = []
    while len(found) < count:
        left, right = rng.randrange(low, high), rng.randrange(low, high)
        key = (min(left, right), max(left, right))
        if key not in seen:
            seen.add(key)
            found.append(Problem(left, right))
    return found


def work_steps(problem: Problem) -> list[str]:
    """The column sums from the last digit up, a carried one added at the end: 345+278 -> 5+8=13, 4+7+1=12, 3+2+1=6."""
    left, right, carry = problem.left, problem.right, 0
    steps = []
    for _ in range(NUM_DIGITS):
        total = left % 10 + right % 10 + carry
        steps.append(f"{left % 10}+{right % 10}{'+1' if carry else ''}={total}")
        left, right, carry = left // 10, right // 10, total // 10
    return steps


def write_response(work: str, answer: str) -> str:
    """A response in the R1-Zero format; it starts with a space because the prompt ends with a colon."""
    return f" <think> {work} </think> <answer> {answer} </answer>"


def corpus(of: list[Problem], seed: int, mixture: Mixture | None = None) -> list[dict[str, str]]:
    """One supervised row `{prompt, response}` per problem, styles drawn from `mixture`. Deterministic by `seed`."""
    mixture = mixture or Mixture()
    rng = random.Random(f"toy corpus {seed}")
    return [{"prompt": problem.question, "response": _response(problem, mixture, rng)} for problem in of]


def _response(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    def noisy(number: str) -> str:
        return "".join(rng.choice("0123456789") if rng.random() < mixture.wrong_digit else digit for digit in number)

    def noisy_step(step: str) -> str:
        terms, total = step.split("=")
        return f"{terms}={noisy(total)}"

    steps = work_steps(problem)
    style = rng.choices(
        ("direct", "partial", "full", "twice"), (mixture.direct, mixture.partial, mixture.full, mixture.twice)
    )[0]
    some = steps[: rng.randint(1, NUM_DIGITS - 1)]
    written = {"direct": [], "partial": some, "full": steps, "twice": steps * 2}[style]
    work = ",".join(noisy_step(step) for step in written) or NO_WORK
    answer = noisy(problem.answer) if len(written) >= NUM_DIGITS else guess(problem, len(written), rng)
    if rng.random() < mixture.malformed:
        return malformed(work, answer, rng)
    return write_response(work, answer)


def guess(problem: Problem, known: int, rng: random.Random) -> str:
    """An answer whose last `known` digits are right; those before them are some other problem's."""
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS
    other = str(rng.randrange(low, high) + rng.randrange(low, high))
    return other[: len(other) - known] + problem.answer[len(problem.answer) - known :]


def malformed(work: str, answer: str, rng: random.Random) -> str:
    """A response that breaks the format, in one of five ways."""
    return rng.choice(
        (
            f" <think> {work} </think> {answer}",
            f" <think> {work} <answer> {answer} </answer>",
            f"<answer> {answer} </answer>",
            f" <think> {work} </think> <answer> {answer}",
            f" {answer}",
        )
    )
