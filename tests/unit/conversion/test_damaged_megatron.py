"""Damaged Megatron checkpoints: each ends in one message with the damaged tensor or file and the remedy."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties

METADATA = "model/.metadata"
BOXES = "model/__0_0.distcp"
KEY = "decoder.final_layernorm.weight"  # of 64 numbers
EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"  # 8 boxes of 64 x 32
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A damage of one kind, and what the message says of it. `is_late`: seen only while tensors are read."""

    name: str
    damage: Damage
    names: str
    remedy: str
    is_late: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    of: str = "megatron"


def late(name: str, damage: Damage, names: str = KEY, remedy: str = "restore the checkpoint", **options: Any) -> Case:
    return Case(name, damage, names, remedy, True, options)


def text(file: str, content: str | bytes) -> Damage:
    return lambda source: (source / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: str, by: int) -> Damage:
    return lambda source: os.truncate(source / file, (source / file).stat().st_size - by)


def read_metadata(source: Path) -> Metadata:
    return pickle.loads((source / METADATA).read_bytes())


def metadata(change: Callable[[Metadata], object]) -> Damage:
    """Other metadata, itself in order."""

    def damage(source: Path) -> None:
        found = read_metadata(source)
        change(found)
        (source / METADATA).write_bytes(pickle.dumps(found))

    return damage


def tensor(key: str, **changes: Any) -> Damage:
    """Other words in the metadata about a tensor."""
    return metadata(lambda found: vars(found.state_dict_metadata[key]).update(changes))


def place(key: str, **changes: Any) -> Damage:
    """Other words in the metadata about where a tensor's first box stands."""

    def change(found: Metadata) -> None:
        index = next(index for index in found.storage_data if index.fqn == key)
        found.storage_data[index] = replace(found.storage_data[index], **changes)

    return metadata(change)


def moved_chunk(found: Metadata) -> None:
    """The second expert's box said to be at half of the first's, all as large as before."""
    chunks = found.state_dict_metadata[EXPERTS].chunks
    second = MetadataIndex(EXPERTS, chunks[1].offsets)
    chunks[1] = ChunkStorageMetadata(torch.Size((0, 32, 0)), chunks[1].sizes)
    found.storage_data[MetadataIndex(EXPERTS, chunks[1].offsets)] = found.storage_data.pop(second)


def box(change: Callable[[bytearray], object]) -> Damage:
    """Other bytes where a tensor is stored, as many as before."""

    def damage(source: Path) -> None:
        info = next(info for index, info in read_metadata(source).storage_data.items() if index.fqn == KEY)
        content = bytearray((source / BOXES).read_bytes())
        part = content[info.offset : info.offset + info.length]
        change(part)
        assert len(part) == info.length
        content[info.offset : info.offset + info.length] = part
        (source / BOXES).write_bytes(content)

    return damage


def flipped(mark: bytes, at: int = 0) -> Damage:
    """One byte flipped so far behind a mark in what torch.save wrote, which is a zip file."""

    def change(part: bytearray) -> None:
        part[part.index(mark) + at] ^= 0xFF

    return box(change)


def instead(stored: Any, key: str = KEY) -> Damage:
    """Something else stored where a tensor is, and the metadata true about its place."""

    def damage(source: Path) -> None:
        buffer = io.BytesIO()
        torch.save(stored, buffer)
        at = (source / BOXES).stat().st_size
        with open(source / BOXES, "ab") as file:
            file.write(buffer.getvalue())
        place(key, offset=at, length=len(buffer.getvalue()))(source)

    return damage


def config(**changes: Any) -> Damage:
    def damage(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def config_of_qwen2(source: Path) -> None:
    fields = json.loads((source / "config.json").read_text())
    base = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"}
    base |= {"rms_norm_eps", "max_position_embeddings"}
    kept = {name: fields[name] for name in base}
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2", **kept}))


METADATA_CASES = [
    Case("nothing there", shutil.rmtree, f"{METADATA}: no such file", "--megatron must name"),
    Case("metadata missing", lambda s: (s / METADATA).unlink(), f"{METADATA}: no such file", "--megatron must name"),
    Case("metadata empty", text(METADATA, ""), METADATA, "restore the checkpoint"),
    Case("metadata garbage", text(METADATA, "<html>404 not found</html>"), METADATA, "restore the checkpoint"),
    Case("metadata cut", cut(METADATA, 9), METADATA, "restore the checkpoint"),
    Case("metadata of another thing", text(METADATA, pickle.dumps({})), f"{METADATA}: holds a dict", "restore the"),
    Case("no tensors in it", metadata(lambda m: delattr(m, "state_dict_metadata")), METADATA, "restore the checkpoint"),
    Case("no places in it", metadata(lambda m: vars(m).update(storage_data=None)), METADATA, "restore the checkpoint"),
    Case("place not a number", place(KEY, offset="8"), f"{KEY} is at ('8', ", "restore the checkpoint"),
    Case("place before the file", place(KEY, offset=-5), f"{KEY} is at (-5, ", "restore the checkpoint"),
    Case("place in no file", place(KEY, relative_path=7), f"{KEY} is in 7, which is no", "restore the checkpoint"),
    Case("parts without number", tensor(KEY, chunks=[None]), METADATA, "restore the checkpoint"),
    Case("parts of other dimensions", tensor(EXPERTS, size=(8, 2048)), f"{EXPERTS} has a part of other", "restore"),
    Case(
        "place missing", metadata(lambda m: m.storage_data.pop(MetadataIndex(KEY, (0,)))),
        f"{METADATA}: {KEY}: names no file", "restore the checkpoint",
    ),
    Case("parts missing", metadata(lambda m: m.state_dict_metadata[EXPERTS].chunks.pop()), EXPERTS, "restore it"),
    late("parts overlap", metadata(moved_chunk), f"{METADATA}: {EXPERTS}[0,0,0]: its stored parts overlap"),
    Case("tensor missing", metadata(lambda m: m.state_dict_metadata.pop(KEY)), f"{KEY} is missing", "restore both"),
    Case(
        "tensor extra", metadata(lambda m: m.state_dict_metadata.update(extra=m.state_dict_metadata[KEY])),
        "tensor extra", "check config.json",
    ),
    Case("shape wrong", tensor(KEY, size=torch.Size((65,))), f"{KEY}: got shape (65,)", "restore both"),
    Case(
        "dtype whole numbers", tensor(KEY, properties=TensorProperties(dtype=torch.int64)),
        f"{KEY}: got dtype torch.int64; must be float", "choose another checkpoint",
    ),
]  # fmt: skip
FILE_CASES = [
    Case("boxes missing", lambda s: (s / BOXES).unlink(), f"{BOXES}: No such file", "restore it"),
    Case("boxes cut", cut(BOXES, 1), f"{BOXES}: truncated", "restore it"),
    Case("boxes in another file", place(KEY, relative_path="lost.distcp"), "model/lost.distcp: No such", "restore it"),
    Case("no config", lambda s: (s / "config.json").unlink(), "config.json: no such file", "restore it"),
    Case("config not JSON", text("config.json", "{"), "config.json: not JSON", "restore the file"),
    Case("config of another family", config_of_qwen2, "is missing; config.json needs it", "restore both"),
    Case("config of a wider model", config(v_head_dim=16), "config.json makes it", "restore both"),
    Case("config of a deeper model", config(num_hidden_layers=3), "decoder.layers.2.", "restore both"),
    Case("config of a shallower model", config(num_hidden_layers=1), "tensor decoder.layers.1.", "check config.json"),
    Case("config of FP8", config(quantization_config={}), "quantization_config: got {}", "convert it"),
    Case("former scales cut", cut("fp8_scales.safetensors", 1), "fp8_scales.safetensors: truncated", "restore it"),
    late("stored zeros", box(lambda part: part.__setitem__(slice(None), bytes(len(part)))), f"{BOXES}: {KEY}"),
    late("stored elsewhere", box(lambda part: part.__setitem__(slice(None), part[9:] + part[:9])), f"{BOXES}: {KEY}"),
    late("zip begins otherwise", flipped(b"PK\3\4"), f"{BOXES}: {KEY}"),
    late("zip entry flipped", flipped(b"PK\1\2"), f"{BOXES}: {KEY}"),
    late("zip end flipped", flipped(b"PK\5\6"), f"{BOXES}: {KEY}"),
    late("zip directory lost", flipped(b"PK\6\7", 8), f"{BOXES}: {KEY}"),
    late("byte order flipped", flipped(b"little"), f"{BOXES}: {KEY}"),
    late("pickle flipped", flipped(b"\x80\2c"), f"{BOXES}: {KEY}"),
    late("pickled names flipped", flipped(b"_rebuild_tensor_v2"), f"{BOXES}: {KEY}"),
    late("pickled dtype flipped", flipped(b"BFloat16Storage"), f"{BOXES}: {KEY}"),
    late("pickled shape flipped", flipped(b"K@\x85", 1), f"{BOXES}: {KEY}"),
    late("stored shorter than said", place(KEY, length=100), f"{BOXES}: {KEY}"),
    late("another tensor's place", instead(torch.zeros(7)), f"{BOXES}: {KEY}"),
    late("no tensor stored", instead({"a": 1}), f"{BOXES}: {KEY}"),
    late("code stored", instead(os.system), f"{BOXES}: {KEY}: its bytes are damaged (UnpicklingError)"),
    late(
        "weight NaN", instead(torch.full((64, 96), math.nan), "decoder.layers.0.mlp.linear_fc2.weight"),
        "model.layers.0.mlp.down_proj.weight: a weight is NaN", "mend the checkpoint", dtype="fp8",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", [*METADATA_CASES, *FILE_CASES], ids=lambda case: case.name)
def test_damage_is_named_with_its_remedy(case: Case, bench: Any) -> None:
    bench.check(case)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp8"])
def test_the_same_checkpoint_converts_undamaged(dtype: str | None, bench: Any) -> None:
    outcome = bench.convert(bench.copy("megatron"), dtype=dtype)
    assert (outcome.out / "conversion.json").is_file() and not bench.partial.exists()
