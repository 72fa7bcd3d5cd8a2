"""Seeds of purposes are stable numbers, the same in every process."""

from __future__ import annotations

from r1mega.parallel.seed import derive


def test_derive():
    assert derive(0, "rollout", 1) == derive(0, "rollout", 1)
    seeds = {derive(seed, path, number) for seed in range(3) for path in ("rollout", "split") for number in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Worked out once by hand: sha256 of "7/split/3", its first eight bytes, little end first, halved.
    import hashlib

    assert derive(7, "split", 3) == int.from_bytes(hashlib.sha256(b"7/split/3").digest()[:8], "little") // 2
