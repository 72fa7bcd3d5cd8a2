"""Reasoning questions with general ones mixed in from some update on; the order can be resumed to the question."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from r1mega.data.jsonl import read_rows
from r1mega.data.prompts import PromptSource
from r1mega.types import WITHOUT_ANSWER, Prompt

GENERAL = "general"


def read_general(path: str | Path, question_key: str = "question") -> list[Prompt]:
    """The general questions of a JSONL file, without answers and not yet tokenized; a prompt's id is `path:line`.

    A row may say its `domain`, by which it finds its reward: `helpful` and `harmless` belong each to one reward model;
    it is `general` otherwise. Raises ValueError naming `path:line` for an empty file, a malformed line, a key that is
    missing, blank or no text, or a domain whose questions need an answer.
    """
    prompts = []
    for line, row in read_rows(path, (question_key,)):
        domain = row.get("domain", GENERAL)
        if domain not in WITHOUT_ANSWER:
            known = ", ".join(WITHOUT_ANSWER)
            raise ValueError(f"{path}:{line}: 'domain' must be one of {known} here, got {str(domain)[:80]!r}")
        prompts.append(Prompt(id=f"{path}:{line}", question=row[question_key], answer="", domain=domain))
    return prompts


class MixedSource:
    """Hands out prompts of `train`, and from update `begin` on a share of general ones, evenly spread among them.

    The k-th question asked since then, from 0, is a general one where k x share passes a whole number: after any number
    of them the count of general ones is off the share by less than one. Each of the two sources goes through epochs of
    its own.
    """

    def __init__(self, train: PromptSource, general: PromptSource, *, share: float, begin: int) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share: got {share}; must be above 0 and below 1")
        self._train, self._general = train, general
        self._share, self._begin = Fraction(str(share)), begin
        self._is_mixed = False
        self._asked = 0

    @property
    def epoch(self) -> int:
        """The epoch of the training questions, counted from 0."""
        return self._train.epoch

    def at(self, update: int) -> None:
        """The next questions are for a round that begins at `update`."""
        self._is_mixed = update >= self._begin

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        if not self._is_mixed:
            return self._train.next(count)
        numbers = range(self._asked, self._asked + count)
        self._asked += count
        is_general = [int((k + 1) * self._share) > int(k * self._share) for k in numbers]
        general = iter(self._general.next(sum(is_general)))
        train = iter(self._train.next(count - sum(is_general)))
        return [next(general if one else train) for one in is_general]

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return {"train": self._train.state_dict(), "general": self._general.state_dict(), "asked": self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, also by a run that had no general questions yet. Raises ValueError when the
        data, the seed or `shuffle` differ."""
        if "train" not in state:
            self._train.load_state_dict(state)
            return
        self._train.load_state_dict(state["train"])
        self._general.load_state_dict(state["general"])
        self._asked = int(state["asked"])
