"""`tools/compare_logprobs.py`: Megatron at a layout against transformers, log-probs and every gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import compare_logprobs
from r1mega.launch import supervise

TOOL = Path(compare_logprobs.__file__).resolve()


def arguments(checkpoint: Path, layout: str, *options: str) -> list[str]:
    return [str(TOOL), "--hf", str(checkpoint), "--layout", layout, *options]


@pytest.fixture
def compare(nursery, monkeypatch, capfd):
    """Runs the program's main function here, its world in the nursery: exit code, standard output, standard error."""
    monkeypatch.setattr(supervise, "run_world", nursery.run_world)

    def run(checkpoint: Path, layout: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", arguments(checkpoint, layout))
        capfd.readouterr()
        return compare_logprobs.main(), *capfd.readouterr()

    return run


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
def test_agrees_with_transformers(compare, checkpoint, family, layout, overrides):
    exit_code, out, told = compare(checkpoint(family, **overrides), layout)
    assert exit_code == 0, told
    answer = json.loads(out)
    assert answer["max_abs_diff"] <= 1e-4
    assert answer["max_rel_grad_diff"] <= 1e-3, answer["worst_tensor"]
    assert answer["layout"] == layout


def test_a_wrong_table_entry_is_found(checkpoint):
    """By the program as it is started by people, with a world of its own."""
    argv = [sys.executable, *arguments(checkpoint("qwen2"), "tp=2", "--break-table")]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert result.returncode == 1, result.stderr
    answer = json.loads(result.stdout)
    assert answer["max_abs_diff"] > 1e-2
    assert answer["max_rel_grad_diff"] > 1e-1


@pytest.mark.parametrize(
    ("layout", "words"),
    [("tp=3", "num_attention_heads"), ("xp=2", "xp=2"), ("ep=4", "tp x cp x dp"), ("pp=3", "num_hidden_layers")],
)
def test_an_impossible_layout_is_refused(compare, checkpoint, layout, words):
    exit_code, out, told = compare(checkpoint("deepseek_v3"), layout)
    assert (exit_code, out) == (2, "")
    assert words in told
