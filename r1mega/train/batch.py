"""What one micro-batch hands the model: sequences laid end to end, and which positions predict response tokens.

Shape suffixes: T positions of the micro-batch, R response tokens in it, S its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1mega.models.attention import PackedSequences


@dataclass(frozen=True)
class PackItem:
    """One sequence to train on or to score: `tokens` is prompt + response, the response its last `num_response`."""

    tokens: Sequence[int]
    num_response: int


@dataclass
class MicroBatch:
    """Sequences end to end on the device. Row r of the R response tokens is predicted at position `rows_R[r]`."""

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    packed: PackedSequences
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    sequence_R: torch.Tensor  # which of the micro-batch's sequences each response token is of
    samples: tuple[int, ...]  # indices of the sequences in the batch they were taken from
    num_responses: tuple[int, ...]  # response tokens of each


def make_micro_batch(
    sequences: Sequence[PackItem], samples: Sequence[int], *, multiple_of: int, device: torch.device
) -> MicroBatch:
    """Lay the chosen samples end to end and pad to a multiple of `multiple_of` (sequence parallel ranks).

    The padding is a sequence of its own, so no sample sees it. An empty choice gives a micro-batch of padding only.
    """
    tokens: list[int] = []
    positions: list[int] = []
    lengths, rows, targets, owners = [], [], [], []
    for at, sample in enumerate(samples):
        sequence = sequences[sample]
        size, response = len(sequence.tokens), sequence.num_response
        assert 0 < response < size, "a response needs a token before it to be predicted from"
        start = len(tokens)
        tokens.extend(sequence.tokens)
        positions.extend(range(size))
        rows.extend(range(start + size - response - 1, start + size - 1))
        targets.extend(sequence.tokens[size - response :])
        owners.extend([at] * response)
        lengths.append(size)
    padding = -len(tokens) % multiple_of if tokens else multiple_of
    if padding:
        tokens.extend([0] * padding)
        positions.extend(range(padding))
        lengths.append(padding)

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return MicroBatch(
        tokens_1T=on_device(tokens)[None],
        positions_1T=on_device(positions)[None],
        packed=PackedSequences.of(lengths, device),
        rows_R=on_device(rows),
        targets_R=on_device(targets),
        sequence_R=on_device(owners),
        samples=tuple(samples),
        num_responses=tuple(sequences[sample].num_response for sample in samples),
    )
