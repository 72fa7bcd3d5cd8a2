"""Questions with known answers: read, tokenized once, handed out in a resumable order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.data.jsonl import read_rows
from r1mega.data.order import EpochOrder, fingerprint
from r1mega.data.templates import prompt_ids
from r1mega.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


def read_qa(path: str | Path, question_key: str = "question", answer_key: str = "answer") -> list[Prompt]:
    """The questions of a JSONL file, not yet tokenized; a prompt's id is `path:line`.

    Raises ValueError naming `path:line` for an empty file, a malformed line, or a key that is missing or blank.
    """
    rows = read_rows(path, (question_key, answer_key))
    return [
        Prompt(
            id=f"{path}:{line}",
            question=row[question_key],
            answer=row[answer_key],
            domain=str(row.get("domain", "math")),
        )
        for line, row in rows
    ]


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, template: str, max_prompt_tokens: int
) -> list[Prompt]:
    """The prompts with `token_ids` filled in, in the same order.

    Raises ValueError for a prompt of more than `max_prompt_tokens` tokens: cutting it would change the question, and
    dropping it would change the data.
    """
    tokenized = []
    for prompt in prompts:
        token_ids = prompt_ids(template, prompt.question, tokenizer)
        if len(token_ids) > max_prompt_tokens:
            raise ValueError(
                f"{prompt.id}: the prompt has {len(token_ids)} tokens with template {template!r}, the limit is "
                f"{max_prompt_tokens}; raise data.max_prompt_tokens or take this row out of the file"
            )
        tokenized.append(replace(prompt, token_ids=tuple(token_ids)))
    return tokenized


class PromptSource:
    """Hands out prompts for ever; each epoch has its own permutation, fixed by the seed; resumes to the prompt."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        self._prompts = list(prompts)
        content = fingerprint(text for prompt in self._prompts for text in (prompt.question, prompt.answer))
        self._order = EpochOrder(len(self._prompts), seed, shuffle, content)

    @property
    def epoch(self) -> int:
        """The epoch the last prompt was taken from, counted from 0."""
        return self._order.epoch

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; over the end of an epoch it goes on with the next epoch."""
        return [self._prompts[index] for index in self._order.next(count)]

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed or `shuffle` differ."""
        self._order.load_state_dict(state)
