"""Graders by name: what scores a response, what its answer is, and when two answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from r1mega.benchmark.answers import answer_letter, answer_line, choice, drop_f1, same_words
from r1mega.reward.compose import PARTS, Part
from r1mega.reward.math import accuracy, extract_answer, prepare_accuracy, quick_accuracy
from r1mega.types import Prompt, Score

NONE = "none"  # responses are kept, and graded elsewhere


@dataclass(frozen=True)
class Grader:
    """How one kind of question is graded.

    Args:
        part: the reward that scores a response.
        answer: the answer in a response, which votes are counted by; None where answers of samples cannot be compared.
        same: whether two different texts are the same answer; None: math-verify decides, in a process of its own.
        asks: what a row has to hold besides its question: `answer`, `options` or `tests`.
        about: one line for people.
    """

    part: Part
    answer: Callable[[str], str | None] | None
    same: Callable[[str, str], bool] | None
    asks: str
    about: str


def _of_text(reward: Callable[[Prompt, str], Score]) -> Part:
    return Part(reward=reward, quick=reward)


def _never(_first: str, _second: str) -> bool:
    return False


GRADERS: dict[str, Grader] = {
    "math": Grader(PARTS["accuracy"], extract_answer, None, "answer", "math-verify on the answer tags or the last box"),
    "choice": Grader(_of_text(choice), answer_letter, _never, "options", "the letter of the last `Answer: X`"),
    "drop": Grader(_of_text(drop_f1), answer_line, same_words, "answer", "F1 of the words of the last `Answer: ...`"),
}
# Graders that other rewards bring: there where the reward of that name is.
if "code" in PARTS:
    GRADERS["code"] = Grader(PARTS["code"], None, _never, "tests", "all tests pass, on the last block of code")


def why_absent(name: str) -> str | None:
    """Why a grader cannot run here; None where it can."""
    if name == NONE or name in GRADERS:
        return None
    return f"the reward {name!r} is not part of this installation (the rewards are {', '.join(sorted(PARTS))})"


class Grading:
    """A reward for `reward.pool.RewardPool`: the grader of a name, made in each worker."""

    def __init__(self, name: str) -> None:
        self._part = GRADERS[name].part

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self._part.reward(prompt, text)

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The score where it is cheap to get, else None."""
        return self._part.quick(prompt, text)

    def prepare(self) -> None:
        """Do the slow imports ahead of the first text."""
        if self._part.prepare is not None:
            self._part.prepare()


class Sameness:
    """Whether two answers are the same, as a reward: 1 where `text` equals the answer of the prompt."""

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return accuracy(prompt, _tagged(text))

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The score where it is cheap to get, else None."""
        return quick_accuracy(prompt, _tagged(text))

    def prepare(self) -> None:
        """Import what compares."""
        prepare_accuracy()


def _tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"
