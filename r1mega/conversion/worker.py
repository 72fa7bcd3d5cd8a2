"""One part of a conversion: read each piece, make what is asked of it, write it, and record all that."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from r1mega.conversion.hf_source import HfSource, Plain
from r1mega.conversion.plan import APPENDED, Part, Work, dist_file
from r1mega.conversion.scratch import Scratch
from r1mega.models import fp8_blocks
from r1mega.models.safetensors_file import (
    DTYPES,
    WRITE_BYTES,
    Stored,
    as_bytes,
    preallocate,
    read_bytes,
    settle,
    write_bytes,
)

if TYPE_CHECKING:  # it imports torch.distributed.checkpoint, which other conversions need not wait for
    from r1mega.conversion.megatron_source import MegatronSource

_WRAPPING = 2048  # bytes that torch.save needs for a tensor besides its own, at most
PROGRESS_FOLDER = ".progress"


class Worker:
    """Makes parts of one conversion in `target`, the directory under its unfinished name."""

    def __init__(self, source: HfSource | MegatronSource, target: Path) -> None:
        self._source, self._target = source, target
        self._scratch = Scratch()
        torch.serialization.set_crc32_options(False)  # the records have better digests, and it halves the rate

    @torch.no_grad()
    def run(self, part: Part) -> bool:
        """Write the part, then its record, unless both stand whole already; returns whether they did.

        Raises ValueError or OSError saying what went wrong.
        """
        if _stands(self._target, part):
            return True
        is_dist = part.works[0].outputs[0].at == APPENDED
        works = self._write_dist(part) if is_dist else self._write_hf(part)
        path = record_path(self._target, part.index)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(works), encoding="utf-8")
        os.replace(temporary, path)
        return False

    def _write_hf(self, part: Part) -> list[dict[str, Any]]:
        """Tensors into their places in the file that all of the part goes to."""
        first, last = part.works[0].outputs[0], part.works[-1].outputs[-1]
        preallocate(self._target / first.file, first.at, last.at + last.nbytes - first.at)
        works = [self._write_tensors(work) for work in part.works]
        settle(self._target / first.file, first.at, last.at + last.nbytes - first.at)
        return works

    def _write_tensors(self, work: Work) -> dict[str, Any]:
        plains, digests = self._source.read(work.piece, self._scratch)
        tensors = [tensor for plain in plains for tensor in _encoded(work, plain)]
        tensors += tensors[:1] * len(work.made.aliases)
        written = [self._put(output, tensor) for output, tensor in zip(work.outputs, tensors, strict=True)]
        return {"from": digests, "to": written + self._put_scales(work, plains)}

    def _write_dist(self, part: Part) -> list[dict[str, Any]]:
        """Boxes end to end, each as torch.save writes it, which is how a distributed checkpoint stores them."""
        name, works = dist_file(part), []
        with open(self._target / name, "wb", buffering=0) as file:
            sink = _Sink(file)
            preallocate(self._target / name, 0, sum(work.outputs[0].nbytes + _WRAPPING for work in part.works))
            for work in part.works:
                plains, digests = self._source.read(work.piece, self._scratch)
                box = work.made.to_megatron([plain.value for plain in plains])
                (output,) = work.outputs
                assert box.dtype == DTYPES[output.dtype], (output, box.dtype)
                at = file.tell()
                sink.save(_own(box))
                entry = _entry(output, box) | {"file": name, "at": at, "nbytes": file.tell() - at}
                entry |= {"key": work.made.key, "offset": work.made.offset, "of": work.made.global_shape}
                works.append({"from": digests, "to": [entry, *self._put_scales(work, plains)]})
            file.truncate()  # what was set aside beyond the end
        settle(self._target / name, 0, 0)
        return works

    def _put_scales(self, work: Work, plains: list[Plain]) -> list[dict[str, Any]]:
        scales = [plain.scale for plain in plains if plain.scale is not None] if work.scales else []
        return [self._put(output, scale) for output, scale in zip(work.scales, scales, strict=True)]

    def _put(self, output: Stored, tensor: torch.Tensor) -> dict[str, Any]:
        tensor = tensor.to(DTYPES[output.dtype])
        assert tuple(tensor.shape) == output.shape, (output, tensor.shape)
        tensor = tensor.contiguous()
        write_bytes(self._target / output.file, output.at, tensor)
        return _entry(output, tensor) | {"file": output.file, "at": output.at, "nbytes": output.nbytes}


class _Sink:
    """An unbuffered file as torch.save needs it, which takes what a short write leaves for written."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def save(self, tensor: torch.Tensor) -> None:
        """Append the tensor. Raises OSError naming the file."""
        try:
            torch.save(tensor, self)
        except (OSError, RuntimeError):  # torch makes either of an error of `write`
            if self._error is None:
                raise
            raise self._error from None

    def write(self, data: bytes) -> int:
        """Write all of the data."""
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):
                done += self._file.write(view[done : done + WRITE_BYTES])
        except OSError as error:
            self._error = OSError(error.errno, error.strerror, self._file.name)
            raise
        return done

    def flush(self) -> None:
        """Nothing: the file has no buffer."""


def record_path(target: Path, index: int) -> Path:
    """The record of a finished part."""
    return target / PROGRESS_FOLDER / f"part-{index:05d}.json"


def _stands(target: Path, part: Part) -> bool:
    """Whether a part stands whole on the disk, every byte as recorded."""
    try:
        works = json.loads(record_path(target, part.index).read_text(encoding="utf-8"))
        return all(_is_as_recorded(target, entry) for work in works for entry in work["to"])
    except Exception:  # no record, or a damaged one; damaged bytes make torch.load raise nearly anything
        return False


def _is_as_recorded(target: Path, entry: dict[str, Any]) -> bool:
    raw = read_bytes(target / entry["file"], entry["at"], entry["nbytes"])
    if "key" in entry:
        raw = torch.load(io.BytesIO(as_bytes(raw)), weights_only=True)
    return xxhash.xxh3_128_hexdigest(as_bytes(raw)) == entry["xxh3_128"]


def _encoded(work: Work, plain: Plain) -> Iterator[torch.Tensor]:
    """What is stored of a tensor: itself, or its FP8 values and scales."""
    if not any(output.dtype == "F8_E4M3" for output in work.outputs):
        yield plain.value
        return
    try:
        yield from fp8_blocks.quantize(plain.value, plain.scale)
    except ValueError as error:
        names = ", ".join(output.name for output in work.outputs if output.dtype == "F8_E4M3")
        raise ValueError(f"{names}: {error}; FP8 cannot hold it; mend the checkpoint, or convert to bf16") from None


def _own(box: torch.Tensor) -> torch.Tensor:
    """The box as all of its storage: torch.save writes the whole storage of a view."""
    storage = box.untyped_storage()
    if storage.nbytes() == box.nbytes and box.is_contiguous():
        return box
    return torch.frombuffer(as_bytes(box.contiguous()), dtype=torch.uint8).view(box.dtype).view(box.shape)


def _entry(output: Stored, tensor: torch.Tensor) -> dict[str, Any]:
    digest = xxhash.xxh3_128_hexdigest(as_bytes(tensor.contiguous()))
    return {"name": output.name, "dtype": output.dtype, "shape": output.shape, "xxh3_128": digest}
