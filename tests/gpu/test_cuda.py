"""What only a GPU can show: CUDA kernels and NCCL give the numbers that CPU and gloo give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COMPARE = REPO / "tools" / "compare_logprobs.py"


def compare(checkpoint: Path, *options: str) -> dict:
    argv = [sys.executable, str(COMPARE), "--hf", str(checkpoint), "--device", "cuda", *options]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "llama"])
def test_torch_spec_agrees_with_transformers_on_cpu(checkpoint, family):
    """fp32 without TF32, torch's default: only the order of sums differs."""
    answer = compare(checkpoint(family))
    assert answer["max_abs_diff"] <= 1e-4
    assert answer["max_rel_grad_diff"] <= 1e-3, answer["worst_tensor"]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "llama"])
def test_transformer_engine_agrees_with_transformers_on_cpu(checkpoint, family):
    """Transformer Engine's fp32 matrix products may run in TF32: ten bits of mantissa, 1e-3 relative a product."""
    answer = compare(checkpoint(family), "--layer-spec", "te")
    assert answer["max_abs_diff"] <= 2e-2
    assert answer["max_rel_grad_diff"] <= 5e-2, answer["worst_tensor"]


@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", []), ("fp32", ["memory=lean"]), ("bf16", []), ("bf16", ["memory=lean"])],
    ids=["fp32", "fp32 lean", "bf16", "bf16 lean"],
)
def test_two_rounds_on_one_gpu(checkpoint, tmp_path, precision, options):
    data = tmp_path / "train.jsonl"
    rows = [{"question": f"{a} plus {b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    argv = [
        sys.executable, "-m", "r1mega.cli", "train", "experiment=r1_zero_gsm8k", "device=cuda",
        f"precision={precision}", f"model.hf={checkpoint('deepseek_v3')}",
        f"data.train={data}", f"run.dir={run_dir}", "algo.updates=4",
        "algo.questions_per_round=2", "algo.group_size=4", "rollout.max_tokens=24", *options,
    ]  # fmt: skip
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280, cwd=REPO)
    assert result.returncode == 0, result.stderr
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    gaps = [gap for line in lines if (gap := json.loads(line).get("sync/logprob_gap_mean")) is not None]
    assert len(gaps) == 2
    # bf16 keeps 8 bits of mantissa: engine and trainer round differently along the way.
    assert max(gaps) <= (1e-5 if precision == "fp32" else 5e-2)
