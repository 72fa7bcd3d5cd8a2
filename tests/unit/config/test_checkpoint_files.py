from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from r1mega.config.checkpoint_files import check_tokenizer, check_weights, read_header


def shard(path: Path, *names: str) -> Path:
    save_file({name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in names}, path)
    return path


def index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def messages(directory: Path) -> list[str]:
    return [str(fault) for fault in check_weights(directory, "model.hf")]


def test_the_header_of_a_file_by_the_reference_writer(tmp_path: Path) -> None:
    header = read_header(shard(tmp_path / "a.safetensors", "x", "y"))
    assert sorted(header) == ["x", "y"]
    assert header["x"]["shape"] == [2, 3]
    assert header["x"]["dtype"] == "F32"


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("single", [True, False])
def test_whole_checkpoints_pass(tmp_path: Path, single: bool) -> None:
    if single:
        shard(tmp_path / "model.safetensors", "x")
    else:
        shard(tmp_path / "1.safetensors", "x")
        shard(tmp_path / "2.safetensors", "y", "z")
        index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors", "z": "2.safetensors"})
    assert messages(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_a_truncated_file_is_found_wherever_it_ends(tmp_path: Path, keep: int) -> None:
    path = shard(tmp_path / "model.safetensors", "x")
    path.write_bytes(path.read_bytes()[:keep])
    (message,) = messages(tmp_path)
    assert message.startswith(f"model.hf: got {path}: ")
    assert "truncated" in message or "too short" in message
    assert message.endswith("; must be a whole, readable file; download or write the file again")


def test_the_sizes_of_a_truncated_file_are_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "model.safetensors", "x")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert f"truncated: {len(whole) - 4} bytes, its header says {len(whole)}" in messages(tmp_path)[0]
    path.write_bytes(whole + b"....")
    assert f"too long: {len(whole) + 4} bytes, its header says {len(whole)}" in messages(tmp_path)[0]


@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint at all", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 8) + b'{"x": 1}'],
)
def test_something_else_is_not_taken_for_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "not a safetensors file" in messages(tmp_path)[0]


def test_every_fault_of_a_sharded_checkpoint_is_reported(tmp_path: Path) -> None:
    shard(tmp_path / "1.safetensors", "x")
    cut = shard(tmp_path / "2.safetensors", "y")
    cut.write_bytes(cut.read_bytes()[:-1])
    shard(tmp_path / "4.safetensors", "v")
    homes = {
        "x": "1.safetensors",
        "y": "2.safetensors",
        "z": "3.safetensors",
        "v": "4.safetensors",
        "w": "4.safetensors",
    }
    index(tmp_path, homes)
    found = messages(tmp_path)
    assert len(found) == 3
    assert "2.safetensors: truncated" in found[0]
    assert f"no file {tmp_path / '3.safetensors'}" in found[1]
    assert f"{tmp_path / '4.safetensors'} without w" in found[2]


def test_no_weights_and_no_tokenizer(tmp_path: Path) -> None:
    assert "must hold model.safetensors or model.safetensors.index.json" in messages(tmp_path)[0]
    assert "model.init=random" in messages(tmp_path)[0]
    assert "must hold a tokenizer" in str(check_tokenizer(tmp_path, "model.hf")[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    assert check_tokenizer(tmp_path, "model.hf") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', "{}"])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    (message,) = messages(tmp_path)
    assert message.startswith(f"model.hf: got {tmp_path / 'model.safetensors.index.json'}: ")
