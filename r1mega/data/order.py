"""The order in which a data set is read: endless, shuffled anew each epoch, resumable to the item."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable
from typing import Any


def fingerprint(parts: Iterable[str]) -> str:
    """A short digest of a data set's content, so that a resumed run notices that the data changed."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


class EpochOrder:
    """Indices 0..num_items-1, epoch after epoch; each epoch its own permutation, a function of (seed, epoch) alone.

    A request that crosses the end of an epoch goes on in the next one, so no item is ever left out. The permutation
    takes four bytes an item.
    """

    def __init__(self, num_items: int, seed: int, shuffle: bool, content: str) -> None:
        if num_items < 1:
            raise ValueError("a data source needs at least one item, got none")
        self.num_items = num_items
        self.seed = seed
        self.shuffle = shuffle
        self.content = content
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def next(self, count: int) -> list[int]:
        """The next `count` indices."""
        if count < 0:
            raise ValueError(f"the number of items asked for must not be negative, got {count}")
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.num_items:
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            part = self._order[self.position : self.position + count - len(taken)]
            self.position += len(part)
            taken.extend(part)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, as plain JSON-able values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_items": self.num_items,
            "content": self.content,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to other data, another seed or order."""
        for name, here in (
            ("num_items", self.num_items),
            ("content", self.content),
            ("seed", self.seed),
            ("shuffle", self.shuffle),
        ):
            if state[name] != here:
                raise ValueError(
                    f"data source: the saved state has {name}={state[name]!r}, this run has {here!r}; "
                    "resume with the data file and seed of the run that was saved, or start a new run"
                )
        self.epoch = int(state["epoch"])
        self.position = int(state["position"])
        self._order = self._permutation()

    def _permutation(self) -> array[int]:
        order = array("I", range(self.num_items))
        if self.shuffle:
            # A text seed is hashed by SHA-512, so neighbouring (seed, epoch) pairs give unrelated permutations.
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order
