"""`tools/compare_logprobs.py`: Megatron at a layout against transformers, log-probs and every gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_logprobs.py"


def compare(checkpoint: Path, layout: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(TOOL), "--hf", str(checkpoint), "--layout", layout, *options]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("family", "layout", "overrides"),
    [
        ("deepseek_v3", "tp=2,pp=2,ep=2", {}),
        (
            "deepseek_v3",
            "tp=2",
            {"q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ),
        ("deepseek_v3", "pp=4", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 2}),
        ("qwen2", "tp=2,pp=2", {"tie_word_embeddings": True}),
    ],
)
def test_agrees_with_transformers(checkpoint, family, layout, overrides):
    result = compare(checkpoint(family, **overrides), layout)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["max_abs_diff"] <= 1e-4
    assert answer["max_rel_grad_diff"] <= 1e-3, answer["worst_tensor"]
    assert answer["layout"] == layout


def test_a_wrong_table_entry_is_found(checkpoint):
    result = compare(checkpoint("qwen2"), "tp=2", "--break-table")
    assert result.returncode == 1, result.stderr
    answer = json.loads(result.stdout)
    assert answer["max_abs_diff"] > 1e-2
    assert answer["max_rel_grad_diff"] > 1e-1


@pytest.mark.parametrize(
    ("layout", "words"),
    [("tp=3", "num_attention_heads"), ("xp=2", "xp=2"), ("ep=4", "tp x cp x dp"), ("pp=3", "num_hidden_layers")],
)
def test_an_impossible_layout_is_refused(checkpoint, layout, words):
    result = compare(checkpoint("deepseek_v3"), layout)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
