"""What a conversion will write, decided before anything is written: every target's file, place, dtype and shape.

The plan follows from the source's headers and the options alone, so that a conversion that was killed makes the same
plan again and goes on. It is cut into parts of some hundred megabytes; each is made by one worker and recorded when it
is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from r1mega.config.checkpoint_files import MODEL_FOLDER
from r1mega.conversion.hf_source import SCALES_FILE
from r1mega.models import fp8_blocks
from r1mega.models.dist_tensors import Piece, box_name
from r1mega.models.fp8_blocks import SCALE_SUFFIX
from r1mega.models.param_map import HfTensor
from r1mega.models.safetensors_file import Stored, lay_out, nbytes_of

PART_BYTES = 256 << 20
FILE_BYTES = 5 << 30  # of one safetensors file, as the Hugging Face hub recommends
MAX_DIST_FILES = 1024
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
APPENDED = -1  # `at` of a box: where it lands is known when it is written


class Source(Protocol):
    """What the plan asks a source."""

    pieces: list[Piece]

    def dtype_of(self, tensor: HfTensor) -> str:
        """The dtype of a tensor once dequantised."""

    def has_scale(self, tensor: HfTensor) -> bool:
        """Whether the tensor comes with the scales of FP8 blocks."""

    def nbytes(self, piece: Piece) -> int:
        """Bytes that reading the piece takes."""


@dataclass(frozen=True)
class Work:
    """One piece to read, the piece that is made of it (the same unless the configuration is edited), and where that
    goes. `scales` go into the file of former FP8 scales."""

    piece: Piece
    made: Piece
    outputs: tuple[Stored, ...]
    scales: tuple[Stored, ...] = ()


@dataclass(frozen=True)
class Part:
    """Work that one worker does in a row; `read_bytes` is what it reads."""

    index: int
    works: tuple[Work, ...]
    read_bytes: int


@dataclass(frozen=True)
class ConversionPlan:
    """All parts, and the heads of the safetensors files that they write into."""

    parts: tuple[Part, ...]
    heads: dict[str, bytes]
    file_bytes: dict[str, int]

    @property
    def write_bytes(self) -> int:
        """Bytes of all tensors to be written."""
        works = (work for part in self.parts for work in part.works)
        return sum(output.nbytes for work in works for output in (*work.outputs, *work.scales))


def plan_hf(
    source: Source, pairs: Sequence[tuple[Piece, Piece]], dtype: str | None, *, file_bytes: int = FILE_BYTES
) -> ConversionPlan:
    """Safetensors files with every tensor of the target, in the table's order.

    Args:
        pairs: (piece to read, piece to make of it), of tensors of the same shapes.
        dtype: "bf16", "fp8", or None to keep each tensor's own.
    """
    names: list[list[Entry]] = []
    for read, made in pairs:
        tensors = [
            entry
            for origin, tensor in zip(read.tensors, made.tensors, strict=True)
            for entry in _entries(source, origin, tensor, dtype, fp32=made.slot.fp32)
        ]
        names.append(tensors + [(alias.name, *tensors[0][1:]) for alias in made.aliases])
    groups = _groups([sum(nbytes_of(kind, shape) for _, kind, shape in entries) for entries in names], file_bytes)
    files = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    heads, sizes, outputs = {}, {}, []
    for file, group in zip(files, groups, strict=True):
        head, stored = lay_out([entry for index in group for entry in names[index]], file)
        heads[file], sizes[file] = head, stored[-1].at + stored[-1].nbytes
        placed = iter(stored)
        outputs += [tuple(next(placed) for _ in names[index]) for index in group]
    scales = [()] * len(pairs) if dtype == "fp8" else _plan_scales(source, pairs, heads, sizes)
    works = [Work(*pair, *row) for pair, *row in zip(pairs, outputs, scales, strict=True)]
    return ConversionPlan(tuple(_parts(source, works, PART_BYTES, same_file=True)), heads, sizes)


def plan_megatron(source: Source, pairs: Sequence[tuple[Piece, Piece]]) -> ConversionPlan:
    """A distributed checkpoint with every box of the target, one file for each part.

    Raises ValueError where tensors of different dtypes would share one of its tensors: it would round some of them.
    """
    heads: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    scales = _plan_scales(source, pairs, heads, sizes)
    works = []
    first: dict[str, HfTensor] = {}
    for (read, made), kept in zip(pairs, scales, strict=True):
        dtype = source.dtype_of(first.setdefault(made.key, read.tensors[0]))
        _check_dtypes(source, read, first[made.key], made.key)
        output = Stored(box_name(made), dtype, made.shape, "", APPENDED, nbytes_of(dtype, made.shape))
        works.append(Work(read, made, (output,), kept))
    total = sum(work.outputs[0].nbytes for work in works)
    return ConversionPlan(tuple(_parts(source, works, max(PART_BYTES, total // MAX_DIST_FILES))), heads, sizes)


def dist_file(part: Part) -> str:
    """The file of a distributed checkpoint that a part writes, under the target's directory."""
    return f"{MODEL_FOLDER}/__{part.index}_0.distcp"


def _check_dtypes(source: Source, piece: Piece, first: HfTensor, key: str) -> None:
    for tensor in piece.tensors:
        own, others = source.dtype_of(tensor), source.dtype_of(first)
        if own != others:
            raise ValueError(
                f"{tensor.name}: got {own}; must be {others} as {first.name}, for Megatron keeps both in one tensor, "
                f"{key}; give them one dtype, as by hf-to-hf --dtype bf16"
            )


def _entries(source: Source, origin: HfTensor, tensor: HfTensor, dtype: str | None, *, fp32: bool) -> Iterator[Entry]:
    """What is written of one tensor."""
    if dtype == "fp8" and tensor.fp8:
        yield tensor.name, "F8_E4M3", tensor.shape
        yield tensor.name + SCALE_SUFFIX, "F32", fp8_blocks.scale_shape(tensor.shape)
        return
    own = source.dtype_of(origin)
    keeps = dtype is None or (fp32 and own == "F32")
    yield tensor.name, own if keeps else "BF16", tensor.shape


def _plan_scales(
    source: Source, pairs: Sequence[tuple[Piece, Piece]], heads: dict[str, bytes], sizes: dict[str, int]
) -> list[tuple[Stored, ...]]:
    """Where each piece's former FP8 scales go, with the head of their file added to `heads` where there are any."""
    kept = [[tensor for tensor in made.tensors if tensor.fp8 and source.has_scale(tensor)] for _, made in pairs]
    entries = [
        (tensor.name + SCALE_SUFFIX, "F32", fp8_blocks.scale_shape(tensor.shape)) for row in kept for tensor in row
    ]
    if not entries:
        return [()] * len(pairs)
    heads[SCALES_FILE], stored = lay_out(entries, SCALES_FILE)
    sizes[SCALES_FILE] = stored[-1].at + stored[-1].nbytes
    placed = iter(stored)
    return [tuple(next(placed) for _ in row) for row in kept]


def _groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive indices, as many to a group as fit below the limit, at least one."""
    groups: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups


def _parts(source: Source, works: Sequence[Work], limit: int, *, same_file: bool = False) -> Iterator[Part]:
    """Works in a row up to the limit of written bytes; with `same_file`, all in one file."""
    held: list[Work] = []
    filled = index = 0
    for work in works:
        size = sum(output.nbytes for output in work.outputs)
        crosses = same_file and bool(held) and held[0].outputs[0].file != work.outputs[0].file
        if held and (filled + size > limit or crosses):
            yield Part(index, tuple(held), sum(source.nbytes(done.piece) for done in held))
            held, filled, index = [], 0, index + 1
        held.append(work)
        filled += size
    yield Part(index, tuple(held), sum(source.nbytes(done.piece) for done in held))
