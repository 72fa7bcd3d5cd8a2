"""Supervised examples: a prompt with the response the model is to imitate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.data.jsonl import read_rows
from r1mega.data.order import EpochOrder, fingerprint
from r1mega.data.templates import prompt_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SftRow:
    """One row of the data file; `id` is `path:line`."""

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class SftExample:
    """One tokenized example: prompt, response, end-of-sequence token.

    `loss_mask` has one entry per token: 1 where the token is to be learned (response and end of sequence), 0 on the
    prompt.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def read_sft(path: str | Path, prompt_key: str = "prompt", response_key: str = "response") -> list[SftRow]:
    """The rows of a JSONL file.

    Raises ValueError naming `path:line` for an empty file, a malformed line, or a key that is missing or blank.
    """
    rows = read_rows(path, (prompt_key, response_key))
    return [SftRow(id=f"{path}:{line}", prompt=row[prompt_key], response=row[response_key]) for line, row in rows]


def tokenize_sft(
    rows: Sequence[SftRow],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    *,
    limit: str = "sft.max_length",
) -> list[SftExample]:
    """The rows as token ids, in the same order. `limit` is the field that `max_tokens` comes from.

    Prompt and response are tokenized apart, so that the prompt's ids are the very ids an engine is given later.
    Raises ValueError for an example of more than `max_tokens` tokens, or a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; set `eos_token`")
    examples = []
    for row in rows:
        prompt = prompt_ids(template, row.prompt, tokenizer)
        response = [*tokenizer.encode(row.response, add_special_tokens=False), tokenizer.eos_token_id]
        num_tokens = len(prompt) + len(response)
        if num_tokens > max_tokens:
            raise ValueError(
                f"{row.id}: prompt and response have {num_tokens} tokens with template {template!r}, the limit is "
                f"{max_tokens}; raise {limit} or take this row out of the file"
            )
        mask = (0,) * len(prompt) + (1,) * len(response)
        examples.append(SftExample(token_ids=(*prompt, *response), loss_mask=mask))
    return examples


class SftSource:
    """Hands out examples for ever; each epoch has its own permutation, fixed by the seed; resumes to the example."""

    def __init__(self, examples: Sequence[SftExample], seed: int, shuffle: bool = True) -> None:
        self._examples = list(examples)
        content = fingerprint(str(example.token_ids) for example in self._examples)
        self._order = EpochOrder(len(self._examples), seed, shuffle, content)

    @property
    def epoch(self) -> int:
        """The epoch the last example was taken from, counted from 0."""
        return self._order.epoch

    def next(self, count: int) -> list[SftExample]:
        """The next `count` examples; over the end of an epoch it goes on with the next epoch."""
        return [self._examples[index] for index in self._order.next(count)]

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed or `shuffle` differ."""
        self._order.load_state_dict(state)
