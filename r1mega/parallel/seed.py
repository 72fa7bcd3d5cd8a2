"""One seed for a run, and what each rank and each round makes of it."""

from __future__ import annotations

import hashlib


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "rollout", round)`; different paths are independent.

    Python's own `hash` is salted per process, so a digest is used: every rank must get the same number.
    """
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
