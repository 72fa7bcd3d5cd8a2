"""What stands where in a shard of a Megatron parameter, and what it weighs: the table's operations as integers.

Every operation of the table lays rows of Hugging Face tensors one after the other into the whole width of a shard. So
each shard is a list of `Slice`s: rectangles of Hugging Face tensors, each in one piece in the sender's memory. Padding
of the vocabulary belongs to no slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, singledispatch

from r1mega.models.fp8_blocks import BLOCK
from r1mega.models.param_map import QKV, Cut, GateUp, HfTensor, Op, Slot, Vocabulary, Whole

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
_SCALE_BYTES = 4  # fp32, one for each block

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangle of a Hugging Face tensor and where a shard holds it.

    Args:
        tensor: which of the slot's tensors.
        offset: where the rectangle begins in the tensor.
        shape: of the rectangle.
        row: the row of the shard that its first row is; its rows follow each other and fill the shard's width.
    """

    tensor: int
    offset: Shape
    shape: Shape
    row: int


@dataclass(frozen=True, slots=True)
class Cargo:
    """A slice as it is sent. It may be cut after every `unit_rows` rows; a plan cuts it after every `step_rows`.

    Args:
        dtype: "fp32", "bf16" or "fp8" (with the scales of its blocks).
        nbytes: of the whole slice.
        step_bytes: of `step_rows` rows, scales included.
    """

    slice: Slice
    dtype: str
    nbytes: int
    unit_rows: int
    unit_bytes: int
    step_rows: int
    step_bytes: int

    def row_at(self, nbytes: int) -> int:
        """The rows before a cut that a plan made after so many bytes."""
        if nbytes == self.nbytes:
            return self.slice.shape[0]
        steps, rest = divmod(nbytes, self.step_bytes)
        assert rest == 0, "a cut within a step"
        return steps * self.step_rows


def nbytes_of(shape: Shape, dtype: str) -> int:
    """Bytes of a rectangle of whole blocks, the scales of "fp8" included."""
    scales = _SCALE_BYTES * math.prod(-(-size // BLOCK) for size in shape) if dtype == "fp8" else 0
    return math.prod(shape) * ITEM_BYTES[dtype] + scales


def dtype_of(slot: Slot, tensor: HfTensor, target: str) -> str:
    """The dtype a tensor is sent in to engines that serve `target`."""
    if slot.fp32:
        return "fp32"
    if target == "fp8":
        return "fp8" if tensor.fp8 else "bf16"
    return target


def cargo_of(slot: Slot, shard: int, num_shards: int, target: str, split_bytes: int) -> tuple[Cargo, ...]:
    """What a shard of the slot holds, in the order it is sent in.

    Slices of `split_bytes` and less are not cut. Raises ValueError where FP8 blocks would be cut by the layout.
    """
    kinds = tuple((tensor.shape, dtype_of(slot, tensor, target)) for tensor in slot.tensors)
    try:
        return _cargo(slot.op, kinds, shard, num_shards, split_bytes)
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}") from None


@lru_cache(maxsize=4096)  # the experts of a model are alike
def _cargo(
    op: Op, kinds: tuple[tuple[Shape, str], ...], shard: int, num_shards: int, split_bytes: int
) -> tuple[Cargo, ...]:
    return tuple(
        _weigh(piece, *kinds[piece.tensor], split_bytes)
        for piece in slices_of(op, [shape for shape, _ in kinds], shard, num_shards)
    )


def _weigh(piece: Slice, whole: Shape, dtype: str, split_bytes: int) -> Cargo:
    rows, *rest = piece.shape
    unit_rows = 1
    if dtype == "fp8":
        unit_rows = BLOCK
        for offset, size, end in zip(piece.offset, piece.shape, whole, strict=True):
            if offset % BLOCK or (size % BLOCK and offset + size != end):
                raise ValueError(
                    f"publish dtype: got fp8; the trainer's layout cuts {list(whole)} at {offset}:{offset + size}, "
                    f"within a block of {BLOCK} x {BLOCK}, whose scale no rank can know alone; lower parallel.tp or "
                    "parallel.etp, or publish bf16"
                )
    unit_rows = min(unit_rows, rows)
    unit_bytes = nbytes_of((unit_rows, *rest), dtype)
    units = min(-(-split_bytes // unit_bytes), -(-rows // unit_rows))
    step_rows = min(units * unit_rows, rows)
    step_bytes = nbytes_of((step_rows, *rest), dtype)
    return Cargo(piece, dtype, nbytes_of(piece.shape, dtype), unit_rows, unit_bytes, step_rows, step_bytes)


@singledispatch
def slices_of(op: Op, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    """The slices of shard `index` of `size`: what `op.to_megatron` does with tensors of these shapes, in integers.

    Raises TypeError for an operation that is not declared here.
    """
    raise TypeError(f"{op}: no slices are declared for this operation; add them to r1mega/weights/slices.py")


@slices_of.register
def _(op: Whole, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    yield Slice(0, (0,) * len(shapes[0]), shapes[0], 0)


@slices_of.register
def _(op: Cut, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    shape = shapes[0]
    begin, end = _part(shape[op.dim], index, size)
    if begin < end:
        offset = tuple(begin if dim == op.dim else 0 for dim in range(len(shape)))
        yield Slice(0, offset, tuple(end - begin if dim == op.dim else n for dim, n in enumerate(shape)), 0)


@slices_of.register
def _(op: Vocabulary, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    begin, end = _part(op.vocab_size, index, size)
    if begin < end:
        yield _rows(0, shapes[0], begin, end, 0)


@slices_of.register
def _(op: GateUp, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    row = 0
    for tensor, shape in enumerate(shapes):
        begin, end = _part(shape[0], index, size)
        yield _rows(tensor, shape, begin, end, row)
        row += end - begin


@slices_of.register
def _(op: QKV, shapes: Sequence[Shape], index: int, size: int) -> Iterator[Slice]:
    row = 0
    for group in range(*_part(op.num_groups, index, size)):
        for tensor, shape in enumerate(shapes):
            rows = shape[0] // op.num_groups
            yield _rows(tensor, shape, group * rows, (group + 1) * rows, row)
            row += rows


def _rows(tensor: int, shape: Shape, begin: int, end: int, row: int) -> Slice:
    return Slice(tensor, (begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:]), row)


def _part(length: int, index: int, size: int) -> tuple[int, int]:
    """The part of a length that shard `index` of `size` has, the first ones the longest, as torch.chunk cuts."""
    step = -(-length // size)
    return min(index * step, length), min((index + 1) * step, length)
