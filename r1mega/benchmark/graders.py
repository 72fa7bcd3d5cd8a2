"""Graders by name: what scores a response, what its answer is, and when two answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from r1mega.benchmark.answers import answer_letter, answer_line, choice, drop_f1, same_words
from r1mega.reward.code import CodeLimits, code_passes
from r1mega.reward.math import accuracy, extract_answer, prepare_accuracy, quick_accuracy
from r1mega.types import Prompt, Score

_LIMITS = CodeLimits()
NONE = "none"  # responses are kept, and graded elsewhere
Scoring = Callable[[Prompt, str], Score]


@dataclass(frozen=True)
class Grader:
    """How one kind of question is graded.

    Args:
        reward: makes what scores a response; called once in each process that scores.
        quick: the same score where it is surely cheap to get, else None.
        answer: the answer in a response, which votes are counted by; None where answers of samples cannot be compared.
        same: whether two different texts are the same answer; None: math-verify decides, in a process of its own.
        asks: what a row has to hold besides its question: `answer`, `options` or `tests`.
        prepare: the slow imports that a first text would wait for.
        seconds: what one text may take, where the pool's limit is too short.
    """

    reward: Callable[[], Scoring]
    quick: Callable[[Prompt, str], Score | None]
    answer: Callable[[str], str | None] | None
    same: Callable[[str, str], bool] | None
    asks: str
    prepare: Callable[[], None] | None = None
    seconds: float | None = None


def _never(_first: str, _second: str) -> bool:
    return False


def _not_quickly(_prompt: Prompt, _text: str) -> Score | None:
    return None


def grader(name: str) -> Grader | None:
    """The grader of a name; None where there is none."""
    return _GRADERS.get(name)


_GRADERS: dict[str, Grader] = {
    "math": Grader(lambda: accuracy, quick_accuracy, extract_answer, None, "answer", prepare=prepare_accuracy),
    "choice": Grader(lambda: choice, choice, answer_letter, _never, "options"),
    "code": Grader(
        lambda: partial(code_passes, limits=_LIMITS), _not_quickly, None, _never, "tests", seconds=_LIMITS.hard_seconds
    ),
    "drop": Grader(lambda: drop_f1, drop_f1, answer_line, same_words, "answer"),
}


class Grading:
    """A reward for `reward.pool.RewardPool`: the grader of a name, made in each worker."""

    def __init__(self, name: str) -> None:
        found = grader(name)
        assert found is not None, f"{name} is refused before a process starts"
        self._grader, self._reward = found, found.reward()

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self._reward(prompt, text)

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The score where it is cheap to get, else None."""
        return self._grader.quick(prompt, text)

    def prepare(self) -> None:
        """Do the slow imports ahead of the first text."""
        if self._grader.prepare is not None:
            self._grader.prepare()

    def seconds(self, _prompt: Prompt) -> float | None:
        """What one text may take, where it needs more than the pool gives."""
        return self._grader.seconds


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
