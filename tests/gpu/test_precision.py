"""Precisions of a GPU, held to each other over a short training."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
TE = ("precision=bf16", "device.layer_spec=te")


def test_transformer_engine_trains_as_the_torch_layers_do(sft_losses):
    """bf16 on both sides, other kernels: the sum of fifty losses within 1%. A run's own repetition is 0.3% off, as the
    later losses depend on which update finds the digits' period."""
    bf16, torch_losses = sft_losses(*TE), sft_losses("precision=bf16")
    assert sum(bf16) == pytest.approx(sum(torch_losses), rel=0.01)
    assert sum(bf16[-10:]) < 0.8 * sum(bf16[:10]), "nothing was learned, so the comparison says nothing"


@pytest.mark.parametrize(
    ("fp8", "bf16"),
    [
        (("precision=fp8", "device.layer_spec=te"), TE),
        (("precision=fp8_emulated",), ("precision=bf16",)),
    ],
    ids=["te", "emulated"],
)
def test_fp8_trains_as_bf16_does(sft_losses, fp8, bf16):
    """DeepSeek-V3 section 3.3 reports a relative loss error below 0.25%.

    Of letters, not digits, whose period a model finds when chance has it. With benchmarks/fp8_training.py on a CPU
    emulated FP8 is then 0.00% to 0.13% off (four seeds), and bf16 at most 0.01% where its sums are taken in another
    order. What this notices is FP8 that does not train: without scales the losses are 20% off, with weights quantised
    once 40%. One bit less in every operand may pass: how well numbers are rounded is for test_fp8.py.
    """
    theirs, found = (sft_losses(*options, "optim.lr=3e-4", task="markov") for options in (bf16, fp8))
    assert sum(found) == pytest.approx(sum(theirs), rel=0.0025)
    assert found != theirs
    assert sum(found[-10:]) < 0.8 * sum(found[:10]), "nothing was learned, so the comparison says nothing"


def test_moments_in_bf16_train_as_moments_in_fp32_do(sft_losses):
    """V3 section 3.3.3 keeps Adam's moments in bf16 "without incurring observable performance degradation"."""
    bf16, found = sft_losses(*TE), sft_losses(*TE, "precision.moments=bf16")
    assert sum(found) == pytest.approx(sum(bf16), rel=0.0025)
    assert found != bf16
