"""One safetensors file, tensor by tensor: read by position, so that no more than the tensor asked for is in memory.

The format: 8 bytes with the header's length, the header in JSON, then the tensors end to end.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r1mega.config import checkpoint_files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# Written at once: page cache made of larger pages costs several times as much where a host lends memory page by page.
WRITE_BYTES = 1 << 16
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` by the format's name, `at` the position of its first byte in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    at: int
    nbytes: int


def read_header(path: Path) -> list[Stored]:
    """The tensors of a file, in no order. Raises ValueError naming the file where it is missing or not whole."""
    try:
        header = checkpoint_files.read_header(path)  # one tensor after the other, without gaps
        size = path.stat().st_size
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}; must be a whole safetensors file; restore it from its source") from None
    base = size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    found = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype in DTYPES and end - begin != nbytes_of(dtype, shape):
            raise ValueError(
                f"{path}: {name}: {end - begin} bytes for {dtype} of shape {shape}; its header is damaged; restore it"
            )
        found.append(Stored(name, dtype, shape, path.name, base + begin, end - begin))
    return found


def read_bytes(path: Path, at: int, nbytes: int, into: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [nbytes] of a file, in the memory of `into` (uint8, as long or longer) where it is given.

    Raises OSError naming the file; ValueError where the file ends before.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8) if into is None else into[:nbytes]
    view = memoryview(buffer.numpy())
    handle = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < nbytes:
            got = os.preadv(handle, [view[done : done + (1 << 30)]], at + done)
            if got == 0:
                size = os.fstat(handle).st_size
                raise ValueError(f"{path}: ends at byte {size}; its header promises {at + nbytes}; restore it")
            done += got
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)
    return buffer


def write_bytes(path: Path, at: int, data: torch.Tensor, step: int = WRITE_BYTES) -> None:
    """Write a tensor's bytes into a file that exists, from position `at` on, `step` at once. Raises OSError naming it.

    Larger steps are faster where the file's room is set aside (`preallocate`).
    """
    view = as_bytes(data)
    handle = os.open(path, os.O_WRONLY)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(handle, view[done : done + step], at + done)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def preallocate(path: Path, at: int, nbytes: int) -> None:
    """Have the file system set aside a stretch of a file that exists; its length stays.

    Writing there is then cheaper than where blocks have yet to be found, and a full disk shows at once. Nothing where
    the file system cannot. Raises OSError naming the file where it has no room.
    """
    handle = os.open(path, os.O_WRONLY)
    try:
        # Not os.posix_fallocate, which writes into every block where the file system cannot.
        if nbytes and _libc.fallocate64(handle, _KEEP_SIZE, ctypes.c_int64(at), ctypes.c_int64(nbytes)):
            error = ctypes.get_errno()
            if error not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(error, os.strerror(error), str(path))
    finally:
        os.close(handle)


def settle(path: Path, at: int, nbytes: int) -> None:
    """Put a stretch of a file on the disk and out of the page cache. Raises OSError naming the file.

    What is written and not read again soon would fill the machine's memory with its pages.
    """
    handle = os.open(path, os.O_WRONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, at, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which it keeps.

    Not by way of numpy: torch lets no storage be emptied that was once lent to an array, as train.offload does.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    if not tensor.nbytes:
        return memoryview(b"")
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a dtype of the format."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...]]], file: str) -> tuple[bytes, list[Stored]]:
    """The head of a file that will hold these (name, dtype, shape) in this order, and where each of them stands."""
    entries, offset = {}, 0
    for name, dtype, shape in tensors:
        end = offset + nbytes_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    stored = [
        Stored(name, dtype, shape, file, base + entries[name]["data_offsets"][0], nbytes_of(dtype, shape))
        for name, dtype, shape in tensors
    ]
    return struct.pack("<Q", len(text)) + text, stored
