"""Files written tensor by tensor are what the safetensors library reads; damaged heads are refused by name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from r1mega.models.safetensors_file import (
    DTYPES,
    NAMES,
    as_bytes,
    lay_out,
    nbytes_of,
    read_bytes,
    read_header,
    write_bytes,
)

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes, without those that mean NaN where a comparison by value would miss them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and bytes(as_bytes(ours)) == bytes(as_bytes(theirs))


def write(path, tensors: dict[str, torch.Tensor], order=None):
    """As a conversion does: the head, a file of its size, then each tensor at its place, in any order."""
    rows = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, stored = lay_out(rows, path.name)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(max(entry.at + entry.nbytes for entry in stored))
    for index in order or range(len(stored)):
        write_bytes(path, stored[index].at, tensors[stored[index].name])
    return stored


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES)
def test_the_library_reads_what_was_written(tmp_path_factory, data, shapes):
    """Every dtype, odd lengths, empty tensors and single numbers."""
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    dtypes = [data.draw(st.sampled_from(list(NAMES))) for _ in shapes]
    tensors = {f'layers.{i}."ü"': random_tensor(*row, i) for i, row in enumerate(zip(dtypes, shapes, strict=True))}
    stored = write(path, tensors, data.draw(st.permutations(range(len(shapes)))))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert sorted(read_header(path), key=lambda entry: entry.name) == sorted(stored, key=lambda entry: entry.name)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert stored[0].at % 8 == 0


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_what_the_library_wrote_is_read(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    dtypes = list(NAMES)
    tensors = {f"t{i}": random_tensor(dtypes[i % len(dtypes)], shape, i) for i, shape in enumerate(shapes)}
    save_file(tensors, path, metadata={"format": "pt", "by": "another"})
    found = {entry.name: entry for entry in read_header(path)}
    assert found.keys() == tensors.keys()
    for name, entry in found.items():
        assert (entry.dtype, entry.shape, entry.file) == (NAMES[tensors[name].dtype], tensors[name].shape, path.name)
        raw = read_bytes(path, entry.at, entry.nbytes)
        assert same(raw.view(DTYPES[entry.dtype]).view(entry.shape), tensors[name])


def test_every_dtype_is_there(tmp_path):
    tensors = {name: random_tensor(dtype, (3, 4)) for name, dtype in DTYPES.items()}
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == DTYPES
    assert nbytes_of("F8_E4M3", (3, 4)) == 12 and nbytes_of("F64", (3, 4)) == 96 and nbytes_of("BF16", ()) == 2
    # negative control: one bit changed is seen
    loaded["BF16"].view(torch.uint8)[0, 0] ^= 1
    assert [name for name in loaded if not same(loaded[name], tensors[name])] == ["BF16"]


def test_a_tensor_is_written_among_others(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {name: random_tensor(torch.bfloat16, (5, 3), seed) for seed, name in enumerate("abc")}
    stored = write(path, tensors)
    tensors["b"] = random_tensor(torch.bfloat16, (5, 3), 9)
    write_bytes(path, stored[1].at, tensors["b"])
    assert all(same(load_file(path)[name], tensors[name]) for name in tensors)


def test_read_into_memory_that_is_given(tmp_path):
    path = tmp_path / "a.safetensors"
    (entry,) = write(path, {"a": random_tensor(torch.float32, (4, 4))})
    buffer = torch.full((100,), 7, dtype=torch.uint8)
    raw = read_bytes(path, entry.at, entry.nbytes, buffer)
    assert raw.data_ptr() == buffer.data_ptr() and raw.numel() == 64
    assert same(raw.view(torch.float32).view(4, 4), load_file(path)["a"])
    assert buffer[64:].tolist() == [7] * 36


def test_a_disk_that_takes_and_gives_a_little_at_a_time(monkeypatch, tmp_path):
    """The system may read and write less than it is asked to; here 7 bytes at most."""
    read, wrote, counts = os.preadv, os.pwrite, Counter()

    def little_read(handle, buffers, at):
        counts["read"] += 1
        return read(handle, [buffers[0][:7]], at)

    def little_write(handle, data, at):
        counts["write"] += 1
        return wrote(handle, data[:7], at)

    monkeypatch.setattr(os, "preadv", little_read)
    monkeypatch.setattr(os, "pwrite", little_write)
    path, tensors = tmp_path / "a.safetensors", {"a": random_tensor(torch.float32, (5, 4))}
    (entry,) = write(path, tensors)
    assert same(load_file(path)["a"], tensors["a"])
    assert same(read_bytes(path, entry.at, entry.nbytes).view(torch.float32).view(5, 4), tensors["a"])
    assert counts == {"read": 12, "write": 12}


def test_a_file_that_ends_before_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    (entry,) = write(path, {"a": random_tensor(torch.float32, (4, 4))})
    with open(path, "r+b") as file:
        file.truncate(entry.at + 60)
    with pytest.raises(ValueError, match=rf"a\.safetensors: ends at byte {entry.at + 60}; .* {entry.at + 64}; restore"):
        read_bytes(path, entry.at, entry.nbytes)
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated.*restore it from its source"):
        read_header(path)
    with pytest.raises(ValueError, match=r"b\.safetensors: .*No such file"):
        read_header(tmp_path / "b.safetensors")


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


WHOLE = {"first": entry(0, 8), "second": entry(8, 16), "third": entry(16, 24)}


def with_header(path, header, data_bytes=24):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))
    return path


def test_a_header_that_fits_is_taken(tmp_path):
    path = with_header(tmp_path / "a.safetensors", dict(reversed(WHOLE.items())))
    assert {found.name: found.nbytes for found in read_header(path)} == dict.fromkeys(WHOLE, 8)
    assert load_file(path).keys() == WHOLE.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"second": entry(8, 16, shape=(3,))},
        {"second": entry(8, 16, dtype="BF16")},
        {"second": entry(8, 12), "third": entry(12, 24)},
        {"second": entry(0, 8)},
        {"second": entry(4, 12)},
        {"second": entry(16, 24)},
        {"second": entry(16, 8)},
        {"second": entry(-8, 0)},
        {"second": entry(8, 16, shape=(-1, -2))},
        {"second": entry(8, 16, shape=(2.0,))},
        {"second": entry(8.0, 16.0)},
        {"second": entry("8", "16")},
        {"second": {"dtype": "F32", "data_offsets": [8, 16]}},
        {"second": {"shape": [2], "data_offsets": [8, 16]}},
        {"second": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16, 24]}},
        {"second": {"dtype": ["F32"], "shape": [2], "data_offsets": [8, 16]}},
    ],
    ids=lambda changes: json.dumps(list(changes["second"].values())),
)
def test_offsets_that_do_not_fit_are_refused_by_name(tmp_path, changes):
    """What the library refuses is refused here too, with the file and the tensor."""
    path = with_header(tmp_path / "a.safetensors", WHOLE | changes)
    with pytest.raises((SafetensorError, ValueError, OverflowError)):
        load_file(path)
    with pytest.raises(ValueError, match=r"a\.safetensors: (second|third): .*restore it"):
        read_header(path)


@pytest.mark.parametrize("data_bytes", [23, 25])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path, data_bytes):
    path = with_header(tmp_path / "a.safetensors", WHOLE, data_bytes)
    with pytest.raises(ValueError, match=r"a\.safetensors: .* bytes, its header says"):
        read_header(path)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_memory_lent_as_bytes(shape: tuple[int, ...]) -> None:
    """It is the tensor's own, outlives the name of the tensor, and a storage that was lent can still be emptied."""
    tensor = torch.arange(math.prod(shape), dtype=torch.bfloat16).reshape(shape) + 1
    expected = tensor.view(torch.int16).numpy().tobytes() if shape else struct.pack("<H", 0x3F80)
    storage = tensor.clone().untyped_storage()
    lent = as_bytes(torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, shape))
    assert bytes(lent) == expected and len(lent) == tensor.nbytes
    storage.resize_(0)
