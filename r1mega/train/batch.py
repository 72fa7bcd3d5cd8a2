"""What one micro-batch hands the model: sequences laid end to end, and which positions predict response tokens.

Shape suffixes: T positions of the micro-batch held by this rank, R response tokens in the micro-batch, S its sequences.
With context parallelism a rank holds a part of each sequence, and so predicts a part of the R tokens only; L counts
those, M what it predicts two tokens ahead, E the sequences whose last token it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from r1mega.models.attention import PackedSequences


@dataclass(frozen=True)
class PackItem:
    """One sequence to train on or to score: `tokens` is prompt + response, the response its last `num_response`.

    A conversation has several responses: `spans` are (begin, end) of each among the tokens, rising, and `num_response`
    is the tokens of all. None: it is the last ones.

    `routed_experts` [tokens - 1, MoE layers of this rank's pipeline stage, top_k] are the experts that the tokens go
    to; the router chooses those of the last token, as nothing is predicted from it. None: the router chooses all.
    """

    tokens: Sequence[int]
    num_response: int
    routed_experts: torch.Tensor | None = field(default=None, compare=False, repr=False)
    spans: tuple[tuple[int, int], ...] | None = None

    def response_places(self) -> list[int]:
        """Where among the tokens those of the response stand."""
        size = len(self.tokens)
        spans = ((size - self.num_response, size),) if self.spans is None else self.spans
        return [place for begin, end in spans for place in range(begin, end)]


ELSEWHERE = PackItem((), 0)  # in the place of a sequence that another data-parallel rank computes


@dataclass
class MicroBatch:
    """Sequences end to end on the device. Prediction l of this rank's L is made at its position `rows_L[l]`.

    `select_L` says which of the R response tokens each prediction is of; None: of all, in order.
    """

    tokens_1T: torch.Tensor
    positions_1T: torch.Tensor
    packed: PackedSequences
    rows_L: torch.Tensor
    targets_L: torch.Tensor
    select_L: torch.Tensor | None
    further_rows_M: torch.Tensor  # where this rank predicts a response token from two before it
    further_targets_M: torch.Tensor
    end_rows_E: torch.Tensor  # where this rank holds the last token of a sequence
    select_E: torch.Tensor | None  # of which of the sequences; None: of all, in order
    sequence_R: torch.Tensor  # which of the micro-batch's sequences each response token is of
    samples: tuple[int, ...]  # indices of the sequences in the batch they were taken from
    num_responses: tuple[int, ...]  # response tokens of each


@dataclass(frozen=True)
class Cut:
    """How a micro-batch is cut over the tensor (sequence) and context parallel ranks."""

    tp: int = 1
    cp: int = 1
    cp_rank: int = 0
    cp_group: dist.ProcessGroup | None = None
    align: int = 1  # what each rank's tokens divide by besides (FP8)

    @property
    def multiple(self) -> int:
        """What the padded length of a pack divides by: each of the 2 cp slices of a sequence has whole tokens, and each
        rank's tokens divide by tp. With cp > 1 it holds for every sequence."""
        return self.align * (self.tp if self.cp == 1 else 2 * self.cp * self.tp)

    def padded(self, length: int) -> int:
        """The next length that can be cut."""
        return length + -length % self.multiple

    def pack_length(self, lengths: Iterable[int]) -> int:
        """Positions that sequences of these lengths take, padding included."""
        total = sum(length if self.cp == 1 else self.padded(length) for length in lengths)
        return max(self.padded(total), self.multiple)


@dataclass
class _Laid:
    """Sequences end to end, as lists over the whole pack: before it is cut over context ranks."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    holders: list[int] = field(default_factory=list)  # the sequence each token is of, -1 for padding
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # where each response token is predicted
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # the sequence each response token is of
    ends: list[int] = field(default_factory=list)  # where the last token of each sequence stands

    def add(self, at: int, sequence: PackItem, length: int) -> None:
        """One sequence, padded at its end to `length`."""
        size, start, places = len(sequence.tokens), len(self.tokens), sequence.response_places()
        assert places and places[0] > 0, "a response needs a token before it to be predicted from"
        assert len(places) == sequence.num_response and places[-1] < size
        self.tokens.extend((*sequence.tokens, *[0] * (length - size)))
        self.positions.extend(range(length))
        self.holders.extend([at] * size + [-1] * (length - size))
        self.lengths.append(length)
        self.rows.extend(start + place - 1 for place in places)
        self.targets.extend(sequence.tokens[place] for place in places)
        self.owners.extend([at] * len(places))
        self.ends.append(start + size - 1)

    def pad(self, count: int) -> None:
        """A sequence of padding alone."""
        if count:
            self.tokens.extend([0] * count)
            self.positions.extend(range(count))
            self.holders.extend([-1] * count)
            self.lengths.append(count)


def make_micro_batch(
    sequences: Sequence[PackItem],
    samples: Sequence[int],
    *,
    cut: Cut,
    device: torch.device,
    length: int = 0,
    balance_weight: float = 0.0,
    moe_layers: Sequence[int] = (),
) -> MicroBatch:
    """Lay the chosen samples end to end, padded to what the cut divides, and to at least `length` positions.

    With cp = 1 the padding is a sequence of its own, so no sample sees it. With cp > 1 each sequence is padded at its
    end, where causality hides the padding from its tokens. An empty choice gives a micro-batch of padding only.
    `moe_layers` are the decoder layers that the items' `routed_experts` are of.
    """
    chosen = [sequences[sample] for sample in samples]
    laid = _Laid()
    for at, sequence in enumerate(chosen):
        size = len(sequence.tokens)
        laid.add(at, sequence, size if cut.cp == 1 else cut.padded(size))
    laid.pad(max(length, cut.pack_length(len(sequence.tokens) for sequence in chosen)) - len(laid.tokens))

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    packed = PackedSequences.of(laid.lengths, device, cp=cut.cp, cp_rank=cut.cp_rank, cp_group=cut.cp_group)
    tokens_T, positions_T, owners_T = map(on_device, (laid.tokens, laid.positions, laid.holders))
    rows_L, targets_L, select_L = _held(packed, on_device(laid.rows), on_device(laid.targets))
    # A prediction from two tokens before needs such a token: the first response token of a one-token prompt has none.
    further = [i for i, row in enumerate(laid.rows) if laid.positions[row] > 0]
    further_rows_M, further_targets_M, _ = _held(
        packed, on_device([laid.rows[i] - 1 for i in further]), on_device([laid.targets[i] for i in further])
    )
    end_rows_E, _, select_E = _held(packed, on_device(laid.ends), on_device(laid.ends))
    if packed.local is not None:
        tokens_T, positions_T, owners_T = (part[packed.local] for part in (tokens_T, positions_T, owners_T))
    packed.owners = owners_T
    packed.num_tokens = on_device([len(sequence.tokens) for sequence in chosen])
    packed.balance_weight = balance_weight
    packed.choices = _choices(chosen, laid, moe_layers, packed.local, device)
    return MicroBatch(
        tokens_1T=tokens_T[None],
        positions_1T=positions_T[None],
        packed=packed,
        rows_L=rows_L,
        targets_L=targets_L,
        select_L=select_L,
        further_rows_M=further_rows_M,
        further_targets_M=further_targets_M,
        end_rows_E=end_rows_E,
        select_E=select_E,
        sequence_R=on_device(laid.owners),
        samples=tuple(samples),
        num_responses=tuple(sequence.num_response for sequence in chosen),
    )


def _choices(
    chosen: Sequence[PackItem], laid: _Laid, moe_layers: Sequence[int], local: torch.Tensor | None, device: torch.device
) -> dict[int, torch.Tensor] | None:
    """The experts to send each of this rank's tokens to, by layer, -1 for the last of a sequence and for padding; None
    where no sequence says."""
    told = [item.routed_experts for item in chosen if item.routed_experts is not None]
    if not told:
        return None
    assert len(told) == len(chosen) and told[0].shape[1] == len(moe_layers)
    whole_TLK = torch.full((len(laid.tokens), *told[0].shape[1:]), -1, dtype=torch.int16)
    start = 0
    for routed, length in zip(told, laid.lengths, strict=False):  # padding alone may follow
        whole_TLK[start : start + len(routed)] = routed
        start += length
    whole_TLK = whole_TLK.to(device)
    if local is not None:
        whole_TLK = whole_TLK[local]
    return {layer: whole_TLK[:, i] for i, layer in enumerate(moe_layers)}


def _held(
    packed: PackedSequences, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of predictions at positions `rows` of the pack, those whose position this rank holds, by its own positions; and
    which they are (None: all)."""
    if packed.local is None:
        return rows, targets, None
    place = torch.full((int(packed.cu_seqlens_q[-1]),), -1, dtype=torch.int64, device=rows.device)
    place[packed.local] = torch.arange(len(packed.local), device=rows.device)
    select = (place[rows] >= 0).nonzero().flatten()
    return place[rows[select]], targets[select], select
