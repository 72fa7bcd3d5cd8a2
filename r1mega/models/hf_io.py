"""Read and write Hugging Face checkpoints, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1mega.config.checkpoint_files import TOKENIZER_FILES
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor
from r1mega.types import NamedTensors

_CONFIGS = ("config.json", "generation_config.json")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class CheckpointReader:
    """The tensors of a checkpoint directory, read one at a time.

    Raises ValueError naming file and remedy where a file is missing, truncated or not safetensors.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.path = Path(checkpoint_dir)
        self._files: dict[str, object] = {}
        self.where = self._index()

    def _index(self) -> dict[str, str]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            return json.loads(index.read_text())["weight_map"]
        single = self.path / "model.safetensors"
        if not single.exists():
            raise ValueError(
                f"{self.path}: holds neither model.safetensors nor its index; must be a checkpoint; check model.hf"
            )
        return dict.fromkeys(self._open(single.name).keys(), single.name)

    def _open(self, name: str):
        if name not in self._files:
            path = self.path / name
            try:
                self._files[name] = safe_open(path, framework="pt")
            except (SafetensorError, FileNotFoundError, OSError) as error:
                raise ValueError(
                    f"{path}: {error}; must be a whole safetensors file; restore it from its source"
                ) from None
        return self._files[name]

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self.where

    def get(self, tensor: HfTensor) -> torch.Tensor:
        """The tensor, on the CPU. Raises ValueError where it is absent or has another shape."""
        if tensor.name not in self.where:
            raise ValueError(f"{self.path}: tensor {tensor.name} is missing; the model needs it; check model.hf")
        value = self._open(self.where[tensor.name]).get_tensor(tensor.name)
        if tuple(value.shape) != tensor.shape:
            raise ValueError(
                f"{self.path}: {tensor.name}: got shape {tuple(value.shape)}; config.json makes it {tensor.shape}"
            )
        if value.dtype not in _DTYPES.values():
            raise ValueError(
                f"{self.path}: {tensor.name}: got dtype {value.dtype}; must be float; convert it to bf16 first"
            )
        return value

    def stream(self) -> NamedTensors:
        """(name, tensor) of the whole checkpoint as an engine loads it, one file after the other.

        Where the embeddings are tied, a head that some writers store besides is left out.
        """
        tied = json.loads((self.path / "config.json").read_text("utf-8")).get("tie_word_embeddings", False)
        for name, file in sorted(self.where.items(), key=lambda entry: entry[::-1]):
            if not (tied and name == "lm_head.weight"):
                yield name, self._open(file).get_tensor(name)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor, from the file headers alone."""
        found = {}
        for file in sorted(set(self.where.values())):
            with open(self.path / file, "rb") as handle:
                (size,) = struct.unpack("<Q", handle.read(8))
                header = json.loads(handle.read(size))
            found |= {name: _DTYPES.get(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        return found

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        """Names in the checkpoint that the table does not have."""
        return sorted(set(self.where) - set(expected))


class RandomWeights:
    """Weights made from names: the same tensors whatever the layout and the rank that asks."""

    def __init__(self, fields: HfFields, seed: int) -> None:
        self._std = fields["initializer_range"]
        self._seed = seed

    def holds(self, name: str) -> bool:
        """False: a name that repeats another tensor gets no numbers of its own."""
        return False

    def get(self, tensor: HfTensor) -> torch.Tensor:
        """normal(0, initializer_range) in fp32 for weights, ones for norms, zeros for biases."""
        if tensor.kind == "norm":
            return torch.ones(tensor.shape)
        if tensor.kind == "zero":
            return torch.zeros(tensor.shape)
        digest = hashlib.sha256(f"{self._seed}/{tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(tensor.shape, generator=generator) * self._std


class CheckpointWriter:
    """Writes tensors into safetensors files of a size limit; `close` adds the index and makes the directory whole.

    Nothing that looks finished stands at `path` before `close`: the files are written beside it and moved at the end.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source: Path,
        dtypes: dict[str, torch.dtype],
        tokenizer: Path | None = None,
        file_bytes: int = 4 << 30,
        config_changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self._tokenizer = tokenizer or source
        self._part = self.path.with_name(self.path.name + ".part")
        self._source, self._dtypes, self._limit = source, dtypes, file_bytes
        self._config_changes = dict(config_changes or {})
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total = 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor, in the dtype its source had (the tensor's own where the source had none)."""
        tensor = tensor.detach().to("cpu", self._dtypes.get(name) or tensor.dtype).contiguous().clone()
        nbytes = tensor.numel() * tensor.itemsize
        if self._pending and self._pending_bytes + nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += nbytes

    def _flush(self) -> None:
        save_file(self._pending, self._part / f"part-{len(self._names):05d}", metadata={"format": "pt"})
        self._names.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, the index and the config and tokenizer files, and move the whole into place."""
        self._flush()
        count = len(self._names)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            (self._part / f"part-{i:05d}").rename(self._part / name)
        if count > 1:
            weight_map = {tensor: name for name, held in zip(names, self._names, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        for name in (*_CONFIGS, *TOKENIZER_FILES):
            source = self._tokenizer if name in TOKENIZER_FILES else self._source
            if (source / name).exists():
                shutil.copyfile(source / name, self._part / name)
        if self._config_changes:
            config = self._part / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | self._config_changes, indent=2) + "\n")
        if self.path.exists():
            shutil.rmtree(self.path)
        self._part.rename(self.path)
