"""What reward models learn from: pairs of responses of which one is better, and responses with a label."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.data.jsonl import read_rows
from r1mega.data.order import EpochOrder, fingerprint
from r1mega.data.sft import SftExample, SftRow, tokenize_sft
from r1mega.data.summary import final_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

LABELS = {1: 1.0, 0: 0.0, "1": 1.0, "0": 0.0, "safe": 1.0, "unsafe": 0.0}  # true is 1, false is 0


@dataclass(frozen=True)
class PreferenceRow:
    """One row of the data file; `id` is `path:line`. A pair is (chosen, rejected) and has no label."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    label: float | None = None


@dataclass(frozen=True)
class PreferenceExample:
    """One tokenized row: each response behind the prompt, with the end-of-sequence token the score is read at."""

    sequences: tuple[SftExample, ...]
    label: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def read_pairs(path: str | Path) -> list[PreferenceRow]:
    """The rows {prompt, chosen, rejected} of a JSONL file, of each response its final summary alone.

    A helpful reward model sees no thinking (DeepSeek-R1, section 3.1). Raises ValueError naming `path:line` for an
    empty file, a malformed line, a key that is missing or blank, a response without a summary, or two that are equal.
    """
    rows = []
    for line, row in read_rows(path, ("prompt", "chosen", "rejected")):
        place = f"{path}:{line}"
        pair = (final_summary(row["chosen"]), final_summary(row["rejected"]))
        for name, text in zip(("chosen", "rejected"), pair, strict=True):
            if not text:
                raise ValueError(f"{place}: {name!r} has nothing after its thinking; take this row out of the file")
        if pair[0] == pair[1]:
            raise ValueError(f"{place}: 'chosen' and 'rejected' have the same summary; take this row out of the file")
        rows.append(PreferenceRow(place, row["prompt"], pair))
    return rows


def read_labels(path: str | Path) -> list[PreferenceRow]:
    """The rows {prompt, response, label} of a JSONL file; 1, true and "safe" are one label, 0, false and "unsafe" the
    other.

    Raises ValueError naming `path:line` as `read_pairs`, and for any other label.
    """
    rows = []
    for line, row in read_rows(path, ("prompt", "response")):
        label = row.get("label")
        if not isinstance(label, int | str) or label not in LABELS:
            raise ValueError(
                f'{path}:{line}: \'label\': got {label!r}; must be 1, true or "safe", or 0, false or "unsafe"'
            )
        rows.append(PreferenceRow(f"{path}:{line}", row["prompt"], (row["response"],), LABELS[label]))
    return rows


READERS: dict[str, Callable[[str | Path], list[PreferenceRow]]] = {"pairs": read_pairs, "labels": read_labels}
"""By the format of the data."""


def tokenize_preferences(
    rows: Sequence[PreferenceRow], tokenizer: PreTrainedTokenizerBase, template: str, max_tokens: int
) -> list[PreferenceExample]:
    """The rows as token ids, in the same order. Raises ValueError as `tokenize_sft`."""
    flat = [SftRow(row.id, row.prompt, response) for row in rows for response in row.responses]
    done = iter(tokenize_sft(flat, tokenizer, template, max_tokens, limit="reward_model.max_length"))
    return [PreferenceExample(tuple(next(done) for _ in row.responses), row.label) for row in rows]


class PreferenceSource:
    """Hands out examples for ever; each epoch has its own permutation, fixed by the seed; resumes to the example."""

    def __init__(self, examples: Sequence[PreferenceExample], seed: int, shuffle: bool = True) -> None:
        self._examples = list(examples)
        parts = (f"{example.label} {[s.token_ids for s in example.sequences]}" for example in self._examples)
        self._order = EpochOrder(len(self._examples), seed, shuffle, fingerprint(parts))

    def next(self, count: int) -> list[PreferenceExample]:
        """The next `count` examples; over the end of an epoch it goes on with the next epoch."""
        return [self._examples[index] for index in self._order.next(count)]

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, as JSON-able values."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data, the seed or `shuffle` differ."""
        self._order.load_state_dict(state)


def balance_lengths(
    lengths: Sequence[tuple[int, int]], *, seed: int, bins_per_doubling: int = 2, largest: float = 8.0
) -> list[int]:
    """Which pairs to keep so that the length of a response says nothing about which of two was chosen.

    Pairs are parted by how many times longer the longer response is, in bins of equal ratio; of each bin as many are
    kept in which the chosen one is longer as in which the rejected one is, drawn by the seed. Pairs of equal length all
    stay; pairs more unequal than `largest` times share one bin. DeepSeek-R1 (section 3.1) only says that chosen and
    rejected responses are of comparable length over the data set; how is ours.

    Args:
        lengths: (chosen, rejected) of each pair, in tokens or characters, >= 1.
        bins_per_doubling: bins between a ratio and twice that ratio.

    Returns:
        Indices to keep, ascending.
    """
    kept: list[int] = []
    bins: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, (chosen, rejected) in enumerate(lengths):
        if chosen == rejected:
            kept.append(index)
            continue
        ratio = min(max(chosen, rejected) / min(chosen, rejected), largest)
        bins[math.floor(bins_per_doubling * math.log2(ratio))][chosen > rejected].append(index)
    rng = random.Random(f"{seed}/lengths")
    for _, sides in sorted(bins.items()):
        count = min(map(len, sides))
        for side in sides:
            kept += rng.sample(side, count)
    return sorted(kept)
