"""Precisions that only a GPU has, held to each other over a short training."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Widths that FP8 products divide, and enough of them that a loss means something.
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 48,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


def losses(checkpoint: Path, folder: Path, *options: str) -> list[float]:
    """The losses of 50 supervised updates on lines of digits that repeat."""
    rng = random.Random(0)
    data = folder / "train.jsonl"
    rows = [{"prompt": "go on:", "response": "".join(rng.choices("0123", k=4)) * 6} for _ in range(400)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = folder / "run"
    argv = [
        sys.executable, "-m", "r1mega.cli", "train", "stage=sft", "data=sft", "device=cuda", f"model.hf={checkpoint}",
        f"data.train={data}", f"run.dir={run_dir}", "sft.updates=50", "sft.batch_size=16", "sft.max_length=256",
        "data.template=plain", "optim.lr=1e-3", "export.hf=false", *options,
    ]  # fmt: skip
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280, cwd=REPO)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bf16(checkpoint, tmp_path_factory) -> list[float]:
    source = checkpoint("deepseek_v3", **WIDE)
    return losses(source, tmp_path_factory.mktemp("te"), "precision=bf16", "device.layer_spec=te")


def test_transformer_engine_trains_as_the_torch_layers_do(checkpoint, bf16, tmp_path):
    """bf16 on both sides, other kernels: the mean of the last ten losses within 1%."""
    torch_losses = losses(checkpoint("deepseek_v3", **WIDE), tmp_path, "precision=bf16")
    assert sum(bf16[-10:]) == pytest.approx(sum(torch_losses[-10:]), rel=0.01)
    assert sum(bf16[-10:]) < 0.8 * sum(bf16[:10]), "nothing was learned, so the comparison says nothing"


def test_fp8_trains_as_bf16_does(checkpoint, bf16, tmp_path):
    """DeepSeek-V3 section 3.3 reports a relative loss error below 0.25%."""
    found = losses(checkpoint("deepseek_v3", **WIDE), tmp_path, "precision=fp8", "device.layer_spec=te")
    assert sum(found) == pytest.approx(sum(bf16), rel=0.0025)
    assert found != bf16
