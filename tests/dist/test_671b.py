"""The table of DeepSeek-V3 is the published checkpoint, tensor for tensor, and what every rank of a cluster holds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from r1mega.models import fp8_blocks
from r1mega.models.dist_tensors import pieces_of

sys.path.insert(0, str(Path(__file__).parent))
from imagined_671b import FIELDS

SCRIPT = Path(__file__).with_name("imagined_671b.py")


def imagined(layout: str, *options: str) -> dict:
    result = subprocess.run([sys.executable, SCRIPT, layout, *options], capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_the_table_is_the_published_checkpoint():
    """Numbers of the hub's own count of dtypes and of the index file: 91,991 tensors, 684,531,386,000 elements."""
    elements: Counter[str] = Counter()
    names: list[str] = []
    for piece in pieces_of(FIELDS):
        for tensor in (*piece.tensors, *piece.aliases):
            names.append(tensor.name)
            dtype = "FP8" if tensor.fp8 else "F32" if piece.slot.fp32 else "BF16"
            elements[dtype] += math.prod(tensor.shape)
            if tensor.fp8:
                names.append(tensor.name + fp8_blocks.SCALE_SUFFIX)
                elements["F32"] += math.prod(fp8_blocks.scale_shape(tensor.shape))
    assert len(names) == len(set(names)) == 91_991
    assert elements == {"FP8": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert elements.total() == 684_531_386_000


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param("pp=16,ep=64,dp=64,stages=" + "+".join(["4"] * 15 + ["1"]), 1024, marks=pytest.mark.extended),
        pytest.param("tp=8,cp=4,pp=4,ep=32,stages=16+15+15+15", 128, marks=pytest.mark.extended),
        pytest.param("tp=8,pp=16,ep=8,stages=" + "+".join(["4"] * 15 + ["1"]), 128, marks=pytest.mark.extended),
        ("pp=16,ep=32,dp=32,stages=" + "+".join(["3"] + ["4"] * 14 + ["2"]), 512),
    ],
)
def test_every_parameter_of_every_rank_is_filled_exactly_once(layout, ranks):
    found = imagined(layout)
    assert found["wrong"] == []
    assert found["ranks"] == ranks


def test_a_wrong_row_of_the_table_is_found():
    found = imagined("tp=8,pp=16,ep=8,stages=" + "+".join(["4"] * 15 + ["1"]), "--break")
    assert "linear_proj" in found["wrong"][0]
