"""Precisions of a GPU, held to each other over a short training."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
REPO = Path(__file__).resolve().parents[2]
TE = ("precision=bf16", "device.layer_spec=te")
RECIPES = ("bf16", "te_bf16", "te_fp8", "fp8")


@pytest.fixture(scope="module")
def losses() -> dict[tuple[int, str], list[float]]:
    """(seed, recipe) -> the losses of fifty updates, the same weights and batches for all; benchmarks/fp8_training.py.

    Of letters, not digits, whose period a model finds when chance has it.
    """
    argv = [sys.executable, "-m", "benchmarks.fp8_training", "--task", "markov", "--seeds", "2", "--device", "cuda"]
    result = subprocess.run([*argv, "--recipes", *RECIPES], capture_output=True, text=True, timeout=280, cwd=REPO)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {(record["seed"], record["recipe"]): record["losses"] for record in records}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("fp8", "bf16"), [("te_fp8", "te_bf16"), ("fp8", "bf16")], ids=["te", "emulated"])
def test_fp8_trains_as_bf16_does(losses, fp8, bf16, seed):
    """DeepSeek-V3 section 3.3 reports a relative loss error below 0.25%.

    On an H200 Transformer Engine's FP8 was -0.01% and +0.11% off with these seeds, emulated FP8 -0.06% and +0.11%, and
    bf16 at most 0.03% where its layers or micro-batches are others. What this notices is FP8 that does not train:
    without scales the losses are 20% off, with weights quantised once 40%. One bit less in every operand may pass: how
    well numbers are rounded is for test_fp8.py.
    """
    theirs, found = losses[seed, bf16], losses[seed, fp8]
    print(f"{fp8} beside {bf16}, seed {seed}: {100 * (sum(found) / sum(theirs) - 1):+.3f}%")
    assert len(found) == 50
    assert sum(found) == pytest.approx(sum(theirs), rel=0.0025)
    assert found != theirs
    assert sum(found[-10:]) < 0.8 * sum(found[:10]), "nothing was learned, so the comparison says nothing"


@pytest.mark.parametrize("seed", [0, 1])
def test_transformer_engine_trains_as_the_torch_layers_do(losses, seed):
    """bf16 on both sides, other kernels: -0.03% and +0.01% were seen."""
    assert sum(losses[seed, "te_bf16"]) == pytest.approx(sum(losses[seed, "bf16"]), rel=0.0025)


def test_a_run_in_fp8(sft_losses):
    """The same through `r1mega train`, for eight updates."""
    options = {"updates": 8, "task": "markov"}
    theirs = sft_losses(*TE, "optim.lr=3e-4", **options)
    found = sft_losses("precision=fp8", "device.layer_spec=te", "optim.lr=3e-4", **options)
    assert sum(found) == pytest.approx(sum(theirs), rel=0.0025)
    assert found != theirs


def test_moments_in_bf16_train_as_moments_in_fp32_do(sft_losses):
    """V3 section 3.3.3 keeps Adam's moments in bf16 "without incurring observable performance degradation"."""
    theirs = sft_losses(*TE, "optim.lr=3e-4", task="markov")
    found = sft_losses(*TE, "precision.moments=bf16", "optim.lr=3e-4", task="markov")
    assert sum(found) == pytest.approx(sum(theirs), rel=0.0025)
    assert found != theirs
