"""What ranks of one GPU exchange through the host is what they would exchange otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("staged_ranks.py")
NAMES = [
    "reduced", "broadcast", "gathered", "gathered_of_unequal_size", "scattered_sums", "scattered_sums_of_unequal_size",
    "exchanged", "ring", "waited_for_twice", "coalesced", "subgroup", "objects",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, bool]]:
    """Of each of three ranks, which exchanges gave what they should."""
    folder = tmp_path_factory.mktemp("ranks")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "3", str(folder)], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_an_exchange(found, name):
    assert [rank[name] for rank in found] == [True] * 3


def test_all_of_them(found):
    assert set(found[0]) == set(NAMES)
