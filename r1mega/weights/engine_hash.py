"""SGLang's hashes of a tensor, taken piece by piece: what `/weights_checker` of 0.5.21 prints of each parameter.

Where the engine's parameters are on CPU it is SHA-256 of their bytes, cut to 64 bits (`srt/managers/mm_utils.py`
`tensor_hash`). On CUDA it is a hash of its own (`kernels/ops/memory/gpu_tensor_hash.py`), restated by `GpuHash`. Both
print 16 hex digits.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from r1mega.models.safetensors_file import as_bytes

_WORD = 4
_TILE = 8192  # words hashed together; SGLang's default, which its checker uses
# Words worked on at once. On a host what is worked out from them should stay in its cache: measured 200 MiB/s of a
# core's time with 4 tiles, 33 with 128. A device wants few, large steps.
_BATCHES = {"cpu": 4 * _TILE, "cuda": 1024 * _TILE}
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
_MIX = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's 32-bit finaliser
_SEED = 0x243F6A88
# Of each half of the hash: the factor of a word's position, its rotation, and the seed added to it.
_HALVES = (
    (0x27D4EB2D, 15, _SEED),
    (0x165667B1, 13, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32),
)


class Hash(Protocol):
    """A hash in the making: `update` with the next bytes as often as it takes, then `hex` once."""

    def update(self, nbytes: torch.Tensor) -> None:
        """The next bytes: uint8 [n], contiguous."""

    def hex(self) -> str:
        """16 hex digits of all bytes together."""


class CpuHash:
    """The first 64 bits of SHA-256."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, nbytes: torch.Tensor) -> None:
        self._sha.update(as_bytes(nbytes.cpu()))

    def hex(self) -> str:
        return self._sha.hexdigest()[:16]


class GpuHash:
    """The hash of a parameter on CUDA, worked out with torch where the bytes are, on CPU or CUDA.

    The bytes are read as little-endian words of 32 bits, with zeros after the last. Every word is mixed with its
    position, twice; tiles of 8192 words are summed, mixed with the tensor's size, summed again, and mixed once more.
    Sums let pieces be added as they come, but the size has to be known before.

    It gives what SGLang's kernel gives on a GPU and under Triton's interpreter. Nothing is brought to the host before
    `hex`.

    Args:
        total: bytes of the whole tensor. Raises ValueError from 8 GiB on, where the kernel's 32-bit positions run over.
    """

    def __init__(self, total: int) -> None:
        self._words = -(-total // _WORD)
        if self._words >= 1 << 31:
            raise ValueError(
                f"engine parameter: got {total} bytes; its hash on CUDA is known below 8 GiB; use more ranks"
            )
        self._seen = 0
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._open = torch.zeros(2, 1, dtype=torch.int64)  # sums of both halves of the tile that is not full yet
        self._sum = torch.zeros((), dtype=torch.int64)  # of the tiles that are; it wraps, as that of uint64 does

    def update(self, nbytes: torch.Tensor) -> None:
        if self._rest.numel():
            nbytes = torch.cat([self._rest.to(nbytes.device), nbytes])
        whole = nbytes.numel() // _WORD * _WORD
        self._rest = nbytes[whole:].clone()
        if nbytes.storage_offset() % _WORD:  # torch reads words at multiples of four alone
            nbytes = nbytes.clone()
        for words in nbytes[:whole].view(torch.int32).split(_BATCHES[nbytes.device.type]):
            self._add(words)

    def hex(self) -> str:
        if self._rest.numel():
            zeros = torch.zeros(_WORD - self._rest.numel(), dtype=torch.uint8, device=self._rest.device)
            self._add(torch.cat([self._rest, zeros]).view(torch.int32))
        assert self._seen == self._words, "bytes are missing"
        if self._seen % _TILE:
            self._close(self._open)
        if not self._words:
            return f"{0:016x}"
        mixed = int(self._sum) & _MASK64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # SplitMix64's finaliser
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK64
        return f"{mixed:016x}"

    def _add(self, words: torch.Tensor) -> None:
        """int32 [n]. The tile that is open is filled first, then whole tiles are summed, then another is left open."""
        begin = self._seen
        self._seen += words.numel()
        positions = torch.arange(begin, self._seen, dtype=torch.int32, device=words.device)
        halves = [_mixed_words(words, positions, *half) for half in _HALVES]

        def sums_2T(begin: int, end: int, tiles: int) -> torch.Tensor:
            return torch.stack([half[begin:end].view(tiles, -1).sum(1) for half in halves])

        first = min(-begin % _TILE, words.numel())
        if first:
            self._open = self._open.to(words.device) + sums_2T(0, first, 1)
            if (begin + first) % _TILE == 0:
                self._close(self._open)
                self._open = torch.zeros_like(self._open)
        tiles = (words.numel() - first) // _TILE
        last = first + tiles * _TILE
        if tiles:
            self._close(sums_2T(first, last, tiles))
        if last < words.numel():
            self._open = sums_2T(last, words.numel(), 1)

    def _close(self, sums_2T: torch.Tensor) -> None:
        """int64 [2, tiles], of which the lower 32 bits count: the high and the low half of each tile's hash."""
        size = _signed((self._words * _WORD) & _MASK32)
        high_T, low_T = _finalised(_low_half(sums_2T) ^ size).long()
        self._sum = self._sum.to(sums_2T.device) + ((high_T << 32) + (low_T & _MASK32)).sum()


def hash_for(device: str, total: int) -> Hash:
    """A new hash of a tensor of `total` bytes, as an engine on `device` reports it.

    Raises ValueError for a device whose hash is not known.
    """
    if device == "cpu":
        return CpuHash()
    if device == "cuda":
        return GpuHash(total)
    raise ValueError(f"engine device: got {device!r}; must be cpu or cuda; the hash of no other device is known")


def _mixed_words(words: torch.Tensor, positions: torch.Tensor, factor: int, rotation: int, seed: int) -> torch.Tensor:
    """int32 [n] twice -> int32 [n]. Products and sums of int32 wrap, as those of uint32 do: the bits are the same."""
    turned = (positions << rotation) | _shifted(positions, 32 - rotation)
    return _finalised(words ^ ((positions * _signed(factor) + _signed(seed)) ^ turned))


def _finalised(mixed: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser, in place."""
    mixed ^= _shifted(mixed, 16)
    mixed *= _signed(_MIX[0])
    mixed ^= _shifted(mixed, 13)
    mixed *= _signed(_MIX[1])
    mixed ^= _shifted(mixed, 16)
    return mixed


def _low_half(sums: torch.Tensor) -> torch.Tensor:
    """int64 -> int32: the lower 32 bits."""
    low = sums & _MASK32
    return torch.where(low >> 31 > 0, low - (1 << 32), low).int()


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left; torch repeats the sign."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
