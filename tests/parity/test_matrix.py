"""`tools/parity_matrix.py`: every family at every kind of layout, and what it says of known mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "parity_matrix.py"


def matrix(*options: str, timeout: float = 290) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("families", "num_cells", "num_refused"),
    [
        (("deepseek_v3",), 17, 0),
        (("deepseek_v3_mtp",), 28, 0),
        # Two key and value heads cannot be cut over four ranks.
        (("qwen2", "llama"), 2 * 15, 2 * 1),
    ],
    ids=["deepseek_v3", "deepseek_v3_mtp", "dense"],
)
def test_every_layout_gives_the_same_numbers(tmp_path, families, num_cells, num_refused):
    out = tmp_path / "cells.json"
    result = matrix("--families", *families, "--levers", "without", "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    cells = json.loads(out.read_text())
    assert sum("refused" in cell for cell in cells) == num_refused
    assert len(cells) == num_cells + num_refused
    assert "RED" not in result.stdout


def test_the_levers_change_nothing(tmp_path):
    """Recomputation, overlapped communication, small chunks of logits; bf16 within its own tolerance."""
    out = tmp_path / "cells.json"
    result = matrix("--levers", "only", "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    levers = {name for cell in json.loads(out.read_text()) for name in cell["options"]}
    assert levers >= {
        "recompute",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "logprob_chunk_tokens",
        "params_dtype",
    }


@pytest.mark.parametrize(
    ("broken", "family", "worst"),
    [
        ("layernorm_reduction", "llama", "norm"),
        ("expert_reduction", "deepseek_v3", ".experts."),
        ("down_projection", "deepseek_v3", ""),
        ("gate_up", "qwen2", ""),
    ],
)
def test_known_mistakes_turn_cells_red(tmp_path, broken, family, worst):
    out = tmp_path / "cells.json"
    result = matrix("--break", broken, "--families", family, "--layouts", "tp=2", "--json", str(out))
    assert result.returncode == 1, result.stdout + result.stderr
    (cell,) = json.loads(out.read_text())
    assert cell["max_rel_grad_diff"] > 3e-3
    assert worst in cell["worst_tensor"]
    # These faults are of the backward pass; the table's shows in the log-probs as well.
    assert (cell["max_abs_diff"] > 1e-2) == (broken == "gate_up")


def test_an_unreadable_layout_is_refused():
    result = matrix("--layouts", "xp=2")
    assert result.returncode == 2
    assert "AXIS=N" in result.stderr
