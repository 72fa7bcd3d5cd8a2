"""Who sends which slice of which Hugging Face tensor to which engine rank: integers alone, no process group.

**Receivers.** Every rank of every engine is one (`engine_layout`). It needs every tensor that is not a routed expert's,
whole, because SGLang's loader cuts them itself, and of the routed experts those of its own expert rank, whole too. Each
is handed its own payload. A table that the model uses twice (tied embeddings, the tables that multi-token prediction
shares) is sent once; `Delivery.aliases` are its other names in a checkpoint, which SGLang's loader does not ask for.

**Senders.** A shard of a slot is held by all ranks that `Placement.shard_on` says: copies over dp and cp, over expert
dp, and over tp where a slot is not cut. Any of them may send it. What a shard holds of each tensor, `slices` says: a
rectangle, or one for each query group. So a cut tensor arrives whole from several senders, each slice with its place
in it. Slots that the table marks `is_copy` send nothing: the slot that they repeat does.

**Buckets.** The one global order is the table's, with each layer's experts in turn (`in_turn`). It is cut into buckets
(`bucket`): consecutive tensors of one stage, of which no engine rank needs more than `bucket_bytes`, and which one call
of its loader takes. Larger is only a bucket of one parameter, or of what the loader needs in one call. Whatever one
sender sends one engine rank in one bucket is a message, in parts of at most `bucket_bytes`; larger is only a part of
one row (for FP8, of 128). A bucket needs no other, so a transport may run those of several stages, which have no sender
in common, at the same time; where engine ranks are many more than the ranks of a stage, it should.

**Balance.** In each bucket, the slices that the same copies hold and the same receivers need are laid end to end, once
for each receiver, and this line is cut into one stretch for each copy, as long as evens out what the ranks of the stage
have sent until then (`deal`). Shards with few copies are dealt first, those that every rank may send last. Cuts fall on
rows and leave slices of `split_bytes` or less in one piece, or of a tenth of a rank's share where that is less; a rank
misses its share by about as much. A stretch crosses few receivers, and the same ones in every bucket: links are few and
carry alike.

**What a rank asks for.** The stretches of a stage follow from its own tensors alone, so `sends_of` works out one stage,
`receives_of` all; both make the transfers of a stretch while they are walked. A plan is the same wherever it is made.

Not planned for: who shares a node or a device with whom, and ranks that pass on what they were sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from r1mega.models.fp8_blocks import BLOCK, scale_shape
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor, Slot
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout
from r1mega.weights.bucket import Bucket, buckets_of, in_turn
from r1mega.weights.deal import Line, deal
from r1mega.weights.engine_layout import EngineLayout, Receivers
from r1mega.weights.holders import Holders
from r1mega.weights.slices import ITEM_BYTES, Cargo, Shape, cargo_of, dtype_of, nbytes_of

BUCKET_BYTES = 1 << 30
SPLIT_BYTES = 1 << 18  # smaller messages cost more in their number than they gain in balance
_PIECES = 10  # of a rank's share, at least: so no sender is far above the mean of a small stage (ours)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A rectangle of one Hugging Face tensor, in one piece in the sender's shard.

    Args:
        slot: the parameter that holds it, and `shard` which shard of it the sender has.
        tensor: the Hugging Face tensor.
        dtype: it is sent in: "fp32", "bf16", or "fp8", with the scales of its blocks.
        offset: where the rectangle begins in the tensor.
        shape: of the rectangle.
        row: the row of the shard that it begins at; it takes `shape[0]` rows of it, of the shard's whole width.
    """

    slot: Slot
    shard: int
    tensor: HfTensor
    dtype: str
    offset: Shape
    shape: Shape
    row: int

    @property
    def nbytes(self) -> int:
        """Bytes on the link, scales included."""
        return nbytes_of(self.shape, self.dtype)

    @property
    def scale_offset(self) -> Shape:
        """Of "fp8": where the rectangle's scales begin in the tensor of scales."""
        return tuple(offset // BLOCK for offset in self.offset)

    @property
    def scale_shape(self) -> Shape:
        """Of "fp8": the shape of the rectangle's scales."""
        return scale_shape(self.shape)


@dataclass(frozen=True, slots=True)
class Message:
    """What one trainer rank sends one engine rank of one bucket; `part` counts the messages where it takes several."""

    bucket: int
    part: int
    sender: int
    engine: int
    rank: int
    transfers: tuple[Transfer, ...]

    @property
    def nbytes(self) -> int:
        return sum(transfer.nbytes for transfer in self.transfers)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A tensor that an engine rank is handed whole. "fp8" comes with its scales, of `fp8_blocks.scale_shape(shape)`."""

    name: str
    shape: Shape
    dtype: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one set of copies sends of one bucket.

    Args:
        shard: which shard of the slots they hold.
        slots: numbers of slots in the plan, in order; their slices are the line.
        stretches: int64 [n, 4]: sender, receiver, first byte of the line, last byte (exclusive).
    """

    bucket: int
    shard: int
    slots: tuple[int, ...]
    stretches: np.ndarray


class PublishPlan:
    """The plan from one trainer to its engines.

    Args:
        trainer: the trainer's layout.
        engines: one for each engine.
        dtype: that the engines serve: "bf16", "fp32", or "fp8" for FP8 blocks of 128 x 128 where the family has them. A
            slot that is kept in fp32 is always sent so.
        bucket_bytes: that an engine rank is sent in one go.
        split_bytes: the least that a slice is cut into, but where a rank's share is of few such pieces.
        with_mtp: whether the engines speculate with the multi-token-prediction layer; without, it is not sent.

    Raises:
        ValueError: all that is wrong with the layouts, or an FP8 block that the trainer's layout cuts.
    """

    def __init__(
        self,
        fields: HfFields,
        trainer: Layout,
        engines: Sequence[EngineLayout],
        *,
        dtype: str = "bf16",
        bucket_bytes: int = BUCKET_BYTES,
        split_bytes: int = SPLIT_BYTES,
        with_mtp: bool = True,
    ) -> None:
        self.placement = placement_of(fields, trainer)
        self.receivers = Receivers(tuple(engines), self.placement.num_experts)
        found = trainer.problems(fields.shape())
        for engine in dict.fromkeys(engines):
            found += engine.problems(self.placement.num_experts)
        if not engines:
            found.append("engines: got none; must be at least one; give its layout")
        if dtype not in ITEM_BYTES:
            found.append(f"publish dtype: got {dtype!r}; must be one of {', '.join(ITEM_BYTES)}; choose one of them")
        if min(bucket_bytes, split_bytes) < 1:
            found.append(f"publish bytes: got {bucket_bytes}, {split_bytes}; must be at least 1; raise them")
        if found:
            raise ValueError("\n".join(found))
        self.trainer, self.dtype = trainer, dtype
        self._limit = bucket_bytes
        slots = [slot for slot in slots_of(fields) if not slot.is_copy]
        if not with_mtp:
            slots = [slot for slot in slots if not slot.name.startswith("mtp.")]
        finest = max(trainer.ep, *(engine.ep for engine in engines))
        self.slots = in_turn(slots, max(self.placement.num_experts // finest, 1))
        self.buckets: list[Bucket] = buckets_of(
            self.slots,
            stage_of=self.placement.stage,
            blocks_of=self._blocks,
            nbytes_of=self.nbytes_of,
            limit=bucket_bytes,
        )
        self._splits = self._split_of_stages(split_bytes)
        self._shares: dict[int, list[Share]] = {}
        self._holders = Holders(self.placement, trainer)
        if dtype == "fp8":  # a cut block is refused here, not on some rank while it sends
            for slot in self.slots:
                for shard in range(self.placement.num_shards(slot)):
                    self._cargo(slot, shard)

    def sends_of(self, sender: int) -> Iterator[Message]:
        """What a trainer rank sends, bucket by bucket. Raises ValueError where there is no such rank."""
        yield from self._messages(self.shares(self.trainer.coordinate(sender).pp), 0, sender)

    def receives_of(self, engine: int, rank: int) -> Iterator[Message]:
        """What an engine rank is sent, bucket by bucket. Raises ValueError where there is no such rank."""
        receiver = self.receivers.index(engine, rank)
        shares = [share for stage in range(self.trainer.pp) for share in self.shares(stage)]
        # With interleaved stages the buckets of one stage are not consecutive.
        yield from self._messages(sorted(shares, key=lambda share: share.bucket), 1, receiver)

    def delivered_to(self, engine: int, rank: int) -> Iterator[tuple[int, list[Delivery]]]:
        """(bucket, the tensors of it that an engine rank is handed), in order, where there are any."""
        receiver = self.receivers.index(engine, rank)
        for bucket in self.buckets:
            found = [
                Delivery(tensor.name, tensor.shape, dtype_of(slot, tensor, self.dtype), aliases)
                for slot in self.slots[bucket.begin : bucket.end]
                if self.receivers.needs(receiver, self._blocks(slot))
                for aliases in [tuple(alias.name for alias in slot.aliases)]
                for tensor in slot.tensors
            ]
            if found:
                yield bucket.index, found

    def nbytes_of(self, slot: Slot) -> int:
        """Bytes of all tensors of a slot, as they are sent."""
        return sum(nbytes_of(tensor.shape, dtype_of(slot, tensor, self.dtype)) for tensor in slot.tensors)

    def shares(self, stage: int) -> list[Share]:
        """The stretches of a stage, bucket by bucket; made when first asked for."""
        if stage not in self._shares:
            self._shares[stage] = list(self._deal(stage))
        return self._shares[stage]

    def _deal(self, stage: int) -> Iterator[Share]:
        loads = np.zeros(self.trainer.per_stage, dtype=np.int64)
        base = stage * self.trainer.per_stage
        for bucket in self.buckets:
            if bucket.stage != stage:
                continue
            alike: dict[tuple, list[int]] = {}
            for index in range(bucket.begin, bucket.end):
                slot = self.slots[index]
                for shard in range(self.placement.num_shards(slot)):
                    holders = np.array(self._holders.of(slot, shard), dtype=np.int64)
                    key = len(holders), holders.tobytes(), shard, self._blocks(slot)
                    alike.setdefault(key, []).append(index)
            for (_, holders, shard, blocks), indices in sorted(alike.items()):
                line = Line(self._line(indices, shard)[1])
                if line.nbytes:  # a rank may hold nothing but padding of the vocabulary
                    senders = np.frombuffer(holders, dtype=np.int64) - base
                    stretches = deal(loads, senders, self.receivers.of(blocks), line)
                    stretches[:, 0] += base
                    yield Share(bucket.index, shard, tuple(indices), stretches)

    def _messages(self, shares: Sequence[Share], column: int, number: int) -> Iterator[Message]:
        """The messages whose sender (column 0) or receiver (column 1) is `number`."""
        for bucket, of_bucket in groupby(shares, key=lambda share: share.bucket):
            links: dict[tuple[int, int], list[tuple[Share, int, int]]] = {}
            for share in of_bucket:
                for sender, receiver, begin, end in share.stretches[share.stretches[:, column] == number].tolist():
                    links.setdefault((sender, receiver), []).append((share, begin, end))
            for sender, receiver in sorted(links):
                engine, rank = self.receivers.places[receiver]
                for part, transfers in enumerate(self._parts(links[sender, receiver])):
                    yield Message(bucket, part, sender, engine, rank, tuple(transfers))

    def _parts(self, stretches: Sequence[tuple[Share, int, int]]) -> Iterator[list[Transfer]]:
        """The transfers of a link in one bucket in the table's order, in parts of the limit of bytes."""
        pieces = [piece for stretch in stretches for piece in self._pieces(*stretch)]
        held: list[Transfer] = []
        filled = 0
        for index, shard, cargo, first, last in sorted(pieces, key=lambda piece: piece[:2]):
            while first < last:
                units = (self._limit - filled) // cargo.unit_bytes
                if held and units < 1:
                    yield held
                    held, filled = [], 0
                    continue
                end = min(last, first + max(units, 1) * cargo.unit_rows)
                held.append(self._transfer(self.slots[index], shard, cargo, first, end))
                filled += held[-1].nbytes
                first = end
        if held:
            yield held

    def _pieces(self, share: Share, begin: int, end: int) -> Iterator[tuple[int, int, Cargo, int, int]]:
        """(slot, shard, slice, first row, last row) of a stretch, the rows counted in the slice."""
        owners, cargo = self._line(share.slots, share.shard)
        line = Line(cargo)
        for at in line.overlap(begin, end):
            start = line.start(at)
            first = cargo[at].row_at(max(begin - start, 0))
            yield owners[at], share.shard, cargo[at], first, cargo[at].row_at(min(end - start, cargo[at].nbytes))

    def _transfer(self, slot: Slot, shard: int, cargo: Cargo, first: int, last: int) -> Transfer:
        piece = cargo.slice
        return Transfer(
            slot,
            shard,
            slot.tensors[piece.tensor],
            cargo.dtype,
            (piece.offset[0] + first, *piece.offset[1:]),
            (last - first, *piece.shape[1:]),
            piece.row + first,
        )

    def _line(self, indices: Sequence[int], shard: int) -> tuple[list[int], list[Cargo]]:
        """(number of the slot, slice) of everything that the shards hold, in order."""
        pairs = [(index, cargo) for index in indices for cargo in self._cargo(self.slots[index], shard)]
        return [index for index, _ in pairs], [cargo for _, cargo in pairs]

    def _split_of_stages(self, split_bytes: int) -> list[int]:
        """Of each stage the least that a slice is cut into."""
        sent = [0] * self.trainer.pp
        for slot in self.slots:
            sent[self.placement.stage(slot)] += self.nbytes_of(slot) * len(self.receivers.of(self._blocks(slot)))
        pieces = _PIECES * self.trainer.per_stage
        return [max(min(split_bytes, nbytes // pieces), 1) for nbytes in sent]

    def _cargo(self, slot: Slot, shard: int) -> tuple[Cargo, ...]:
        split = self._splits[self.placement.stage(slot)]
        return cargo_of(slot, shard, self.placement.num_shards(slot), self.dtype, split)

    def _blocks(self, slot: Slot) -> tuple[int, ...]:
        return self.receivers.blocks(slot.expert)
