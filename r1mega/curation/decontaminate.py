"""Texts that share n words in a row with a benchmark: found, so that nothing that is measured on is learned from.

DeepSeek-R1 leaves out what shares a 10-gram with an evaluation's question or reference solution (arXiv 2501.12948v2,
supplement D). Words are normalised: case, punctuation, blanks and Unicode forms make no difference; a Chinese character
is a word. A text of fewer than n words is compared as a whole: with a benchmark text of the same words, and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from r1mega.curation.texts import words
from r1mega.data.jsonl import read_rows

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits modulo 2**64
_AT_ONCE = 4096  # texts whose n-grams are hashed together


class Benchmarks:
    """The n-grams of benchmarks as 64-bit hashes, each with the benchmark that it is of.

    Two different n-grams have the same hash once in 2**64: of 10 million n-grams against an index of a million, the
    chance of one false match is 5e-7.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], n: int) -> None:
        """`texts` are (name of the benchmark, text). Raises ValueError where n is below 1."""
        if n < 1:
            raise ValueError(f"n-grams: got n={n}; must be at least 1")
        self.n = n
        every = list(texts)
        self.names = list(dict.fromkeys(name for name, _ in every))
        self._ids: dict[str, int] = {}
        number = {name: place for place, name in enumerate(self.names)}
        source_of = np.array([number[name] for name, _ in every], dtype=np.int64)
        parts = [(np.empty(0, dtype=np.uint64), source_of[:0])]
        for start in range(0, len(every), _AT_ONCE):
            hashes, owners = self._grams([text for _, text in every[start : start + _AT_ONCE]])
            parts.append((hashes, source_of[start + owners]))
        self._hashes, first = np.unique(np.concatenate([hashes for hashes, _ in parts]), return_index=True)
        self._sources = np.concatenate([sources for _, sources in parts])[first]

    def __len__(self) -> int:
        """Different n-grams."""
        return len(self._hashes)

    def matches(self, texts: Sequence[str]) -> list[str | None]:
        """For each text the benchmark that it overlaps with, None where with none."""
        found: list[str | None] = []
        for start in range(0, len(texts), _AT_ONCE):
            hashes, owners = self._grams(texts[start : start + _AT_ONCE])
            part: list[str | None] = [None] * len(texts[start : start + _AT_ONCE])
            if len(self._hashes) and len(hashes):
                places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
                hit = self._hashes[places] == hashes
                for owner, source in zip(owners[hit][::-1], self._sources[places[hit]][::-1], strict=True):
                    part[owner] = self.names[source]
            found += part
        return found

    def _grams(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(hash, place of its text) of every n-gram, and of every whole text of fewer words."""
        coded = [self._coded(words(text)) for text in texts]
        lengths = np.array([len(ids) for ids in coded], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(coded), dtype=np.uint64, count=int(lengths.sum()))
        owners = np.repeat(np.arange(len(texts)), lengths)
        count = max(0, len(flat) - self.n + 1)
        hashes = np.zeros(count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for k in range(self.n):
                hashes = hashes * _BASE + flat[k : k + count]
        whole = owners[:count] == owners[self.n - 1 :] if count else np.empty(0, dtype=bool)
        short = [place for place, ids in enumerate(coded) if 0 < len(ids) < self.n]
        extra = np.array([_hash_of(coded[place]) for place in short], dtype=np.uint64)
        return (
            np.concatenate([hashes[whole], extra]),
            np.concatenate([owners[:count][whole], np.array(short, dtype=np.int64)]),
        )

    def _coded(self, row: Sequence[str]) -> list[int]:
        """The words as numbers, which are the same in every process."""
        ids = self._ids
        for word in row:
            if word not in ids:
                ids[word] = xxhash.xxh64_intdigest(word.encode())
        return [ids[word] for word in row]


def _hash_of(ids: Sequence[int]) -> int:
    """Of a text shorter than n words: its words and their number."""
    return xxhash.xxh64_intdigest(" ".join(map(str, (len(ids), *ids))).encode())


def read_benchmarks(paths: Sequence[str], keys: Sequence[str], n: int) -> Benchmarks:
    """The index of JSONL files of problems; of every row the texts under `keys` count, each on its own.

    Raises ValueError naming `path:line` for a malformed row, or one that has text under none of the keys.
    """

    def texts() -> Iterable[tuple[str, str]]:
        for path in paths:
            for line, row in read_rows(path, ()):
                found = [row[key] for key in keys if isinstance(row.get(key), str) and row[key].strip()]
                if not found:
                    wanted, there = ", ".join(keys), ", ".join(row)
                    raise ValueError(f"{path}:{line}: none of {wanted} holds text; the keys there are {there}")
                yield from ((Path(path).name, text) for text in found)

    return Benchmarks(texts(), n)
