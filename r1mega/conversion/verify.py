"""Do two checkpoints hold the same weights? Both are read again, whatever their formats, and compared tensor by tensor.

Equal means to the last bit: FP8 blocks by what they dequantise to, a wider dtype once rounded to the narrower one, and
a side in FP8 also where it is exactly what quantising the other gives.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from r1mega.conversion.hf_source import HfSource, Plain
from r1mega.conversion.run import open_source
from r1mega.conversion.scratch import Scratch
from r1mega.models import fp8_blocks
from r1mega.models.dist_tensors import Piece

if TYPE_CHECKING:  # it imports torch.distributed.checkpoint, which other conversions need not wait for
    from r1mega.conversion.megatron_source import MegatronSource

Source: TypeAlias = "HfSource | MegatronSource"
_CHUNK = 32  # pieces that a worker compares in a row


@dataclass(frozen=True)
class Difference:
    """A tensor in which two checkpoints differ; `position` is where first and `largest` by how much at most."""

    name: str
    reason: str
    largest: float = 0.0
    position: tuple[int, ...] = ()
    is_missing: bool = False  # on one side

    def __str__(self) -> str:
        where = f", first at {list(self.position)}, by {self.largest:.6g} at most" if self.position else ""
        return f"{self.name}: {self.reason}{where}"


@dataclass(frozen=True)
class Verdict:
    """The tensors compared, how many of them agree only once rounded, and the differences, in the table's order."""

    tensors: int
    rounded: int
    differences: list[Difference]


def verify(
    left: tuple[str, Path],
    right: tuple[str, Path],
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Compare two checkpoints, each given as (kind, directory), kind "hf" or "megatron".

    A tensor that is only on one side is a difference, unless it repeats another that both have (a tied output table,
    the multi-token-prediction layer's copies). Raises ValueError for a checkpoint that cannot be read.
    """
    torch.set_num_threads(1)  # a process that has started other threads cannot be forked
    sources = [open_source(path, kind) for kind, path in (left, right)]
    pairs, differences = _pairs(*sources)
    total = sum(sources[0].nbytes(piece) for piece, _ in pairs)
    done = tensors = rounded = 0
    progress(0, total)
    chunks = [pairs[first : first + _CHUNK] for first in range(0, len(pairs), _CHUNK)]
    with ProcessPoolExecutor(
        min(workers, max(1, len(chunks))), mp_context=get_context("fork"), initializer=_begin, initargs=sources
    ) as pool:
        for chunk, (found, num_rounded) in zip(chunks, pool.map(_compare_all, chunks), strict=True):
            differences += found
            rounded += num_rounded
            tensors += sum(len(piece.tensors) for piece, _ in chunk)
            done += sum(sources[0].nbytes(piece) for piece, _ in chunk)
            progress(done, total)
    return Verdict(tensors, rounded, differences)


def _pairs(left: Source, right: Source) -> tuple[list[tuple[Piece, Piece]], list[Difference]]:
    """Pieces that both have, and a difference for each tensor that one lacks."""
    by_name = [{piece.tensors[0].name: piece for piece in source.pieces} for source in (left, right)]
    pairs, differences = [], []
    embedding = "model.embed_tokens.weight"
    for name in [*by_name[0], *(name for name in by_name[1] if name not in by_name[0])]:
        found = [pieces.get(name) or (pieces[embedding] if name == "lm_head.weight" else None) for pieces in by_name]
        if found[0] is None or found[1] is None:
            side = left if found[0] is None else right
            differences.append(Difference(name, f"missing in {side.path}", is_missing=True))
        else:
            pairs.append((found[0], found[1]))
    return pairs, differences


_sources: tuple[Source, Source] | None = None


def _begin(left: Source, right: Source) -> None:
    global _sources
    torch.set_num_threads(1)
    _sources = left, right


def _compare_all(pairs: list[tuple[Piece, Piece]]) -> tuple[list[Difference], int]:
    assert _sources is not None
    scratches = Scratch(), Scratch()
    differences, rounded = [], 0
    for pieces in pairs:
        plains = []
        for source, piece, scratch in zip(_sources, pieces, scratches, strict=True):
            try:
                plains.append(source.read(piece, scratch)[0])
            except ValueError as error:
                differences.append(Difference(piece.tensors[0].name, str(error)))
        if len(plains) < 2:
            continue
        for tensor, ours, theirs in zip(pieces[0].tensors, *plains, strict=True):
            found, was_rounded = _compare(tensor.name, ours, theirs)
            differences += found
            rounded += was_rounded
    return differences, rounded


def _compare(name: str, left: Plain, right: Plain) -> tuple[list[Difference], bool]:
    """(the difference of two tensors if there is one, whether they agree only within the rounding of FP8 or bf16)."""
    if left.value.shape != right.value.shape:
        return [Difference(name, f"shape {tuple(left.value.shape)} and {tuple(right.value.shape)}")], False
    ours, theirs = left.value, right.value
    if ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs)):
        return [], False
    if _agree_rounded(left, right):
        return [], True
    gap = (ours.float() - theirs.float()).abs_()
    differing = ~(gap == 0)  # NaN too
    if not bool(differing.any()):
        return [Difference(name, f"{ours.dtype} and {theirs.dtype} differ in zeros' signs")], False
    position = tuple(int(index) for index in differing.nonzero()[0])
    largest = float(gap[differing].nan_to_num(torch.inf).max())
    return [Difference(name, f"{int(differing.sum()):,} of {gap.numel():,} values differ", largest, position)], False


def _agree_rounded(left: Plain, right: Plain) -> bool:
    """Whether rounding the finer of the two as a conversion does gives the other."""
    if left.is_fp8 != right.is_fp8:
        fp8, other = (left, right) if left.is_fp8 else (right, left)
        try:
            again = fp8_blocks.dequantize(*fp8_blocks.quantize(other.value, other.scale))
        except ValueError:  # NaN or infinite, which no FP8 value is a rounding of
            return False
        return torch.equal(_bits(again), _bits(fp8.value))
    if left.value.dtype == right.value.dtype:
        return False
    narrow = min((left.value.dtype, right.value.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(_bits(left.value.to(narrow)), _bits(right.value.to(narrow)))


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)
