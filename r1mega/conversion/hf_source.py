"""A Hugging Face checkpoint as the source of a conversion: checked as a whole first, then read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from r1mega.config import checkpoint_files
from r1mega.conversion.scratch import Scratch
from r1mega.models import fp8_blocks, hf_fields
from r1mega.models.dist_tensors import Piece, pieces_of
from r1mega.models.fp8_blocks import SCALE_SUFFIX
from r1mega.models.param_map import HfTensor
from r1mega.models.safetensors_file import DTYPES, Stored, as_bytes, read_bytes, read_header

_PLAIN = ("BF16", "F32", "F16")
_SHOWN = 10  # faults that a message names
SCALES_FILE = "fp8_scales.safetensors"
"""Beside a checkpoint made from FP8 blocks: their scales, whose last bits bf16 has no room for."""


class Plain(NamedTuple):
    """A tensor without quantisation, and the scales of the FP8 blocks that it came from, if it did."""

    value: torch.Tensor
    scale: torch.Tensor | None = None
    is_fp8: bool = False  # stored in FP8, not only made from it once


class HfSource:
    """The tensors of a checkpoint directory, as its family's table has them.

    `stored` are all its tensors by name; `fields` its config.json. Raises ValueError naming every fault that file
    headers and config.json show: what is missing, cut short, misshapen, of another dtype, or in no table.
    """

    kind = "hf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such directory; must hold a Hugging Face checkpoint; check --hf")
        self.fields = hf_fields.read(self.path, allow_fp8=True)
        fault_list([str(fault) for fault in checkpoint_files.check_weights(self.path, "--hf")])
        self.stored, faults = _stored(self.path)
        self.pieces = list(pieces_of(self.fields))
        faults += self._table_faults()
        fault_list(faults)
        self._known_scales = known_scales(self.path, self.pieces)

    def files(self) -> list[Path]:
        """The files that tensors are read from."""
        return sorted({self.path / held.file for held in (*self.stored.values(), *self._known_scales.values())})

    def names(self) -> set[str]:
        """Every tensor of the checkpoint, scales and repeated ones too."""
        return set(self.stored)

    def describe(self) -> dict[str, dict[str, object]]:
        """Shape and dtype of each of `names`."""
        return {name: {"shape": stored.shape, "dtype": stored.dtype} for name, stored in self.stored.items()}

    def nbytes(self, piece: Piece) -> int:
        """Bytes that reading the piece takes from the disk."""
        return sum(self.stored[name].nbytes for name in self._reads(piece))

    def dtype_of(self, tensor: HfTensor) -> str:
        """The dtype of a tensor once dequantised, by the format's name."""
        dtype = self.stored[tensor.name].dtype
        return "BF16" if dtype == "F8_E4M3" else dtype

    def has_scale(self, tensor: HfTensor) -> bool:
        """Whether `read` gives the scales of the tensor's FP8 blocks."""
        return tensor.name + SCALE_SUFFIX in self.stored or tensor.name in self._known_scales

    def read(self, piece: Piece, scratch: Scratch) -> tuple[list[Plain], dict[str, str]]:
        """(the piece's tensors, digest of every tensor of the checkpoint that was read). They live until the next call.

        Raises ValueError naming a tensor that is not what it should be, OSError where reading fails.
        """
        digests: dict[str, str] = {}
        plains = [self._plain(tensor, str(index), scratch, digests) for index, tensor in enumerate(piece.tensors)]
        first = piece.tensors[0].name
        for alias in self._aliases(piece):
            if alias.name in self.stored:
                digests[alias.name] = _digest(self._raw(alias.name, scratch.take("alias", self.stored[first].nbytes)))
                if digests[alias.name] != digests[first]:
                    raise ValueError(
                        f"{self.path}: {alias.name}: differs from {first}, which it repeats: the model shares "
                        "one table; make them equal in a copy of the checkpoint"
                    )
        return plains, digests

    def _aliases(self, piece: Piece) -> tuple[HfTensor, ...]:
        """The piece's, and a tied output table that some writers store a second time."""
        first = piece.tensors[0]
        if self.fields["tie_word_embeddings"] and first.name == "model.embed_tokens.weight":
            return (*piece.aliases, HfTensor("lm_head.weight", first.shape))
        return piece.aliases

    def _reads(self, piece: Piece) -> Iterator[str]:
        for tensor in (*piece.tensors, *self._aliases(piece)):
            yield from (name for name in (tensor.name, tensor.name + SCALE_SUFFIX) if name in self.stored)

    def _raw(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        stored = self.stored[name]
        return read_bytes(self.path / stored.file, stored.at, stored.nbytes, into)

    def _plain(self, tensor: HfTensor, role: str, scratch: Scratch, digests: dict[str, str]) -> Plain:
        stored = self.stored[tensor.name]
        raw = self._raw(tensor.name, scratch.take(role, stored.nbytes))
        digests[tensor.name] = _digest(raw)
        value = raw.view(DTYPES[stored.dtype]).view(stored.shape)
        if stored.dtype != "F8_E4M3":
            return Plain(value, read_stored(self.path, self._known_scales.get(tensor.name)))
        scale_raw = self._raw(tensor.name + SCALE_SUFFIX)
        digests[tensor.name + SCALE_SUFFIX] = _digest(scale_raw)
        scale = _as_stored(scale_raw, self.stored[tensor.name + SCALE_SUFFIX])
        out = scratch.take(f"{role}.bf16", 2 * stored.nbytes).view(torch.bfloat16).view(stored.shape)
        try:
            return Plain(fp8_blocks.dequantize(value, scale, out), scale, is_fp8=True)
        except ValueError as error:
            raise ValueError(f"{self.path}: {tensor.name}: {error}; restore it from its source") from None

    def _table_faults(self) -> list[str]:
        """What the headers show to be other than the family's table has it."""
        faults, expected = [], set()
        for piece in self.pieces:
            for tensor in piece.tensors:
                expected |= {tensor.name, tensor.name + SCALE_SUFFIX}
                faults += self._tensor_faults(tensor)
            for alias in self._aliases(piece):
                expected.add(alias.name)
                if alias.name in self.stored:
                    faults += self._tensor_faults(alias)
                    own, first = self.stored[alias.name], self.stored.get(piece.tensors[0].name)
                    if first and own.dtype != first.dtype:
                        faults.append(
                            f"{self.path}: {own.name}: got {own.dtype}; must be {first.dtype} as {first.name}, "
                            "which it repeats; restore the file"
                        )
        extra = sorted(self.names() - expected)
        if extra:
            faults.append(
                f"{self.path}: tensor {extra[0]} and {len(extra) - 1} more are in no table of {self.fields.family}; "
                "every tensor must have its place; check model_type and num_hidden_layers of config.json"
            )
        return faults

    def _tensor_faults(self, tensor: HfTensor) -> list[str]:
        stored = self.stored.get(tensor.name)
        if stored is None:
            return [f"{self.path}: tensor {tensor.name} is missing; config.json needs it; restore the checkpoint"]
        where = f"{self.path / stored.file}: {tensor.name}"
        faults = []
        if stored.shape != tensor.shape:
            faults.append(f"{where}: got shape {stored.shape}; config.json makes it {tensor.shape}; restore the file")
        is_fp8 = self.fields.is_fp8 and tensor.fp8
        if stored.dtype not in (*_PLAIN, *(("F8_E4M3",) if is_fp8 else ())):
            allowed = " or ".join((*_PLAIN, "F8_E4M3") if is_fp8 else _PLAIN)
            why = "" if is_fp8 else "; FP8 is known for linear layers of a checkpoint whose config.json says so"
            faults.append(f"{where}: got dtype {stored.dtype}; must be {allowed}{why}; restore the file")
        scale = self.stored.get(tensor.name + SCALE_SUFFIX)
        if stored.dtype == "F8_E4M3" and tensor.fp8:
            blocks = fp8_blocks.scale_shape(tensor.shape)
            if scale is None:
                faults.append(f"{where}: its scales {tensor.name}{SCALE_SUFFIX} are missing; restore the file")
            elif (scale.dtype, scale.shape) != ("F32", blocks):
                got = f"{scale.dtype} {scale.shape}"
                must = f"F32 {blocks}, one for each 128 x 128 block"
                faults.append(f"{where}{SCALE_SUFFIX}: got {got}; must be {must}; restore the file")
        elif scale is not None:
            faults.append(f"{where}: {stored.dtype}, yet it has scales {scale.name}; restore the file")
        return faults


def _stored(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of the checkpoint by name, and what index and files say differently."""
    index = path / checkpoint_files.INDEX
    weight_map = checkpoint_files.read_json_object(index)["weight_map"] if index.exists() else None
    files = sorted(set(weight_map.values())) if weight_map else [checkpoint_files.SINGLE]
    found: dict[str, Stored] = {}
    faults = []
    for file in files:
        for stored in read_header(path / file):
            if weight_map is not None and weight_map.get(stored.name) != file:
                listed = weight_map.get(stored.name)
                where = f"the index has it in {listed}" if listed else "the index does not list it"
                faults.append(f"{path / file}: holds {stored.name}; {where}; download shard and index from one source")
                continue
            found[stored.name] = stored
    return found, faults


def known_scales(path: Path, pieces: list[Piece]) -> dict[str, Stored]:
    """Name of a weight -> where its former scales stand beside the checkpoint.

    Raises ValueError naming the file and a tensor in it that is not the scales of one of the pieces' weights.
    """
    if not (path / SCALES_FILE).exists():
        return {}
    weights = {tensor.name + SCALE_SUFFIX: tensor for piece in pieces for tensor in piece.tensors if tensor.fp8}
    found, faults = {}, []
    for stored in read_header(path / SCALES_FILE):
        weight = weights.get(stored.name)
        blocks = None if weight is None else fp8_blocks.scale_shape(weight.shape)
        if weight is not None and (stored.dtype, stored.shape) == ("F32", blocks):
            found[weight.name] = stored
            continue
        must = f"F32 {blocks}" if blocks else f"the scales of a linear layer ({SCALE_SUFFIX})"
        faults.append(
            f"{path / SCALES_FILE}: {stored.name}: got {stored.dtype} {stored.shape}; must be {must}; restore the "
            "file, or move it away to have the scales made anew from the weights"
        )
    fault_list(faults)
    return found


def read_stored(path: Path, stored: Stored | None) -> torch.Tensor | None:
    """A tensor of a file of the directory; None of None."""
    return None if stored is None else _as_stored(read_bytes(path / stored.file, stored.at, stored.nbytes), stored)


def fault_list(faults: list[str]) -> None:
    """Raise ValueError with the first of the faults, if there are any."""
    if faults:
        rest = [f"... and {len(faults) - _SHOWN} faults more"] if len(faults) > _SHOWN else []
        raise ValueError("\n".join(faults[:_SHOWN] + rest))


def _as_stored(raw: torch.Tensor, stored: Stored) -> torch.Tensor:
    return raw.view(DTYPES[stored.dtype]).view(stored.shape)


def _digest(raw: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(as_bytes(raw))
