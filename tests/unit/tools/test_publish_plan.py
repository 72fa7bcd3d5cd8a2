"""The table of a publish plan, from config.json and two layouts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

QWEN = {
    "model_type": "qwen2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 10000, "tie_word_embeddings": False,
}  # fmt: skip
TOOL = str(Path(__file__).resolve().parents[3] / "tools" / "publish_plan.py")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    import publish_plan

    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL, "--hf", str(path), *arguments])
        code = publish_plan.main()
        return code, *capsys.readouterr()

    return call


def test_the_table_by_hand(run):
    code, out, _ = run("--trainer", "tp=2,pp=2", "--engine", "tp=2", "--engines", "3")
    assert code == 0
    # Both tables [1000, 64], four layers, the final norm; two bytes each, to each of the six engine ranks.
    attention = 64 * 64 + 64 + 2 * (32 * 64 + 32) + 64 * 64
    whole = 2 * (2 * 1000 * 64 + 4 * (attention + 3 * 128 * 64 + 2 * 64) + 64)
    row = next(line for line in out.splitlines() if line.startswith("tp=2 "))
    assert row.split() == ["tp=2", "3", "6", f"{whole / 1e9:.3f}", "1.000", f"{whole / 1e9:.3f}", "1.00x"]
    assert len([line for line in out.splitlines() if line.strip()[:2] in ("0 ", "1 ")]) == 2


def test_a_layout_that_does_not_fit_is_refused(run):
    code, out, err = run("--trainer", "tp=4", "--engine", "tp=2,ep=2")
    assert (code, out) == (2, "")
    assert "parallel.tp: got 4" in err and "engine.ep: got 2; this model has no experts" in err


def test_help_answers_at_once():
    began = time.monotonic()
    result = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, timeout=20)
    assert result.returncode == 0 and "--engine" in result.stdout
    assert time.monotonic() - began < 5  # torch alone takes longer to import
