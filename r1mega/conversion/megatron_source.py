"""A Megatron distributed checkpoint as the source of a conversion: one converted before, or one of a training."""

from __future__ import annotations

import io
import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from r1mega.config.checkpoint_files import METADATA, MODEL_FOLDER
from r1mega.conversion.hf_source import Plain, fault_list, known_scales, read_stored
from r1mega.conversion.scratch import Scratch
from r1mega.models import hf_fields
from r1mega.models.dist_tensors import Piece, box_name, pieces_of
from r1mega.models.param_map import HfTensor, Vocabulary
from r1mega.models.safetensors_file import DTYPES, NAMES, as_bytes

# What a training keeps beside the weights: the optimizer, and copies such as the reference.
_OTHERS = ("optimizer.", "copy.", "chained_")


class MegatronSource:
    """The boxes of a distributed checkpoint, as the family's table has them.

    DIR holds config.json and the folder `model`. Raises ValueError naming every fault that config.json and the
    checkpoint's metadata show: what is missing, cut short, misshapen, of another dtype, or in no table.
    """

    kind = "megatron"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = self.path / MODEL_FOLDER
        if not (self._folder / METADATA).is_file():
            raise ValueError(
                f"{self._folder / METADATA}: no such file; --megatron must name a converted checkpoint, or a run's "
                "checkpoints/update-N"
            )
        self._metadata, self._tensors = _metadata(self._folder)
        self._reader = FileSystemReader(self._folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        fields = hf_fields.read(self.path, drop_mtp=True)
        self.fields = replace(fields, num_mtp_layers=int(any(key.startswith("mtp.") for key in self._tensors)))
        self.pieces = list(pieces_of(self.fields))
        fault_list(self._table_faults() + self._file_faults())
        self._known_scales = known_scales(self.path, self.pieces)

    def files(self) -> list[Path]:
        """The files that tensors are read from."""
        found = {
            self._folder / info.relative_path
            for index, info in self._metadata.storage_data.items()
            if index.fqn in self._tensors
        }
        return sorted(found | {self.path / scale.file for scale in self._known_scales.values()})

    def names(self) -> set[str]:
        """Every box of the checkpoint's weights, as `box_name` calls it."""
        return {box_name(piece) for piece in self.pieces}

    def describe(self) -> dict[str, dict[str, object]]:
        """Shape and dtype of each of `names`."""
        return {
            box_name(piece): {"shape": piece.shape, "dtype": NAMES[self._dtype(piece.key)]} for piece in self.pieces
        }

    def nbytes(self, piece: Piece) -> int:
        """Bytes of the box."""
        return math.prod(piece.shape) * self._dtype(piece.key).itemsize

    def dtype_of(self, tensor: HfTensor) -> str:
        """The dtype of a tensor, by safetensors' name."""
        return self._dtypes[tensor.name]

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every Hugging Face tensor."""
        aliases = {alias.name: piece.tensors[0].name for piece in self.pieces for alias in piece.aliases}
        names = {name: name for name in self._dtypes} | aliases
        return {name: DTYPES[self._dtypes[own]] for name, own in names.items()}

    def has_scale(self, tensor: HfTensor) -> bool:
        """Whether `read` gives the scales of the FP8 blocks that the tensor once came from."""
        return tensor.name in self._known_scales

    def read(self, piece: Piece, scratch: Scratch) -> tuple[list[Plain], dict[str, str]]:
        """(the piece's tensors, digest of the box). They live until the next call.

        Raises ValueError naming a box that cannot be read whole.
        """
        dtype = self._dtype(piece.key)
        box = scratch.take("box", self.nbytes(piece)).view(dtype).view(piece.shape)
        items = create_read_items_for_chunk_list(
            piece.key,
            self._tensors[piece.key],
            [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))],
        )
        if not _fill(items, piece.shape):
            raise ValueError(
                f"{self._folder / METADATA}: {box_name(piece)}: its stored parts overlap or leave gaps; restore the "
                "checkpoint or choose another"
            )
        try:
            self._reader.read_data(LoadPlan(items), _IntoBox(box)).wait()
        except Exception as error:  # damaged bytes make torch.load raise nearly anything
            reason = error.strerror if isinstance(error, OSError) else f"its bytes are damaged ({_line_of(error)})"
            files = {self._metadata.storage_data[item.storage_index].relative_path for item in items}
            raise ValueError(
                f"{self._folder / ', '.join(sorted(files))}: {box_name(piece)}: {reason}; restore the checkpoint or "
                "choose another"
            ) from None
        plains = [
            Plain(value.contiguous(), read_stored(self.path, self._known_scales.get(tensor.name)))
            for tensor, value in zip(piece.tensors, piece.to_hf(box), strict=True)
        ]
        return plains, {box_name(piece): xxhash.xxh3_128_hexdigest(as_bytes(box))}

    def _dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def _table_faults(self) -> list[str]:
        faults, expected = [], set()
        self._dtypes: dict[str, str] = {}
        for piece in self.pieces:
            first_seen = piece.key not in expected
            expected.add(piece.key)
            found = self._tensors.get(piece.key)
            if found is None:
                if first_seen:
                    faults.append(f"{self._folder}: tensor {piece.key} is missing; config.json needs it; restore both")
                continue
            if first_seen:
                faults += self._tensor_faults(piece, found)
            self._dtypes |= {tensor.name: NAMES.get(found.properties.dtype, "?") for tensor in piece.tensors}
        extra = sorted(set(self._tensors) - expected)
        if extra:
            faults.append(
                f"{self._folder}: tensor {extra[0]} and {len(extra) - 1} more are in no table of "
                f"{self.fields.family}; every tensor must have its place; check config.json"
            )
        return faults

    def _tensor_faults(self, piece: Piece, found: TensorStorageMetadata) -> list[str]:
        where, got = f"{self._folder}: {piece.key}", tuple(found.size)
        # A vocabulary is padded to what the saving layout's tp divides.
        is_table = isinstance(piece.slot.op, Vocabulary)
        rows_fit = got[:1] >= piece.global_shape[:1] if is_table else got[:1] == piece.global_shape[:1]
        if not rows_fit or got[1:] != piece.global_shape[1:]:
            return [f"{where}: got shape {got}; config.json makes it {piece.global_shape}; restore both"]
        if found.properties.dtype not in DTYPES.values():
            return [f"{where}: got dtype {found.properties.dtype}; must be float; choose another checkpoint"]
        if sum(math.prod(chunk.sizes) for chunk in found.chunks) != math.prod(got):
            return [f"{where}: its {len(found.chunks)} stored parts do not make up its shape {got}; restore it"]
        if any(MetadataIndex(piece.key, chunk.offsets) not in self._metadata.storage_data for chunk in found.chunks):
            return [f"{self._folder / METADATA}: {piece.key}: names no file for a part of it; restore the checkpoint"]
        return []

    def _file_faults(self) -> list[str]:
        """Files that are missing or end before the parts that the metadata has in them."""
        ends: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            if index.fqn in self._tensors:
                ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        faults = []
        for name, end in sorted(ends.items()):
            try:
                size = (self._folder / name).stat().st_size
            except OSError as error:
                faults.append(f"{self._folder / name}: {error.strerror}; the metadata names it; restore it")
                continue
            if size < end:
                faults.append(f"{self._folder / name}: truncated: {size} bytes, the metadata needs {end}; restore it")
        return faults


def _metadata(folder: Path) -> tuple[Metadata, dict[str, TensorStorageMetadata]]:
    """The checkpoint's metadata, and the weights among its tensors. Raises ValueError where it is damaged."""
    try:
        # Not pickle.load: one flipped bit can make it fill the memory.
        found = pickle._Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
        assert isinstance(found, Metadata), f"holds a {type(found).__name__}"
        tensors = {
            key: tensor
            for key, tensor in found.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and not key.startswith(_OTHERS)
        }
        _check_kinds(found, tensors)
    except Exception as error:  # damaged bytes make unpickling raise nearly anything
        raise ValueError(
            f"{folder / METADATA}: {_line_of(error)}; must be what torch.distributed.checkpoint wrote; restore the "
            "checkpoint"
        ) from None
    return found, tensors


def _check_kinds(metadata: Metadata, tensors: dict[str, TensorStorageMetadata]) -> None:
    """Raise an exception where what is read of the metadata is not there, or of another kind."""
    for index, info in metadata.storage_data.items():
        if index.fqn in tensors:
            numbers = (info.offset, info.length)
            assert isinstance(info.relative_path, str), f"{index.fqn} is in {info.relative_path!r}, which is no file"
            assert all(type(number) is int and number >= 0 for number in numbers), f"{index.fqn} is at {numbers}"
    for key, tensor in tensors.items():
        assert isinstance(tensor.properties.dtype, torch.dtype), f"{key} has no dtype"
        for chunk in tensor.chunks:
            sizes = (tensor.size, chunk.offsets, chunk.sizes)
            assert all(isinstance(size, tuple) for size in sizes), f"{key} has a part without a place"
            assert len({len(size) for size in sizes}) == 1, f"{key} has a part of other dimensions"


def _line_of(error: Exception) -> str:
    """One line that says what was wrong. torch's advice to load without care is left out."""
    lines = str(error).strip().splitlines()
    if isinstance(error, pickle.UnpicklingError) or not lines:
        return type(error).__name__
    text = lines[0][:200]
    return text if isinstance(error, AssertionError | RuntimeError | OSError) else f"{type(error).__name__}: {text}"


def _fill(items: list[ReadItem], shape: tuple[int, ...]) -> bool:
    """Whether the items fill a box of a shape: as large together, and no two overlap."""
    places = [list(zip(item.dest_offsets, item.lengths, strict=True)) for item in items]
    return sum(math.prod(item.lengths) for item in items) == math.prod(shape) and not any(
        all(a < b + length_b and b < a + length_a for (a, length_a), (b, length_b) in zip(one, other, strict=True))
        for one, other in itertools.combinations(places, 2)
    )


class _IntoBox(LoadPlanner):
    """Puts what is read where the read items say, into one tensor."""

    def __init__(self, box: torch.Tensor) -> None:
        self._box = box

    def set_up_planner(self, state_dict: object, metadata: object = None, is_coordinator: bool = False) -> None:
        raise AssertionError("the plan is made by hand")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._box
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: the tensor is a view of the box."""
