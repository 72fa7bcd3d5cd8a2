"""The GRPO loss, its gradient and the updates it leads to do not depend on tp, pp, ep, dp or on the packing.

Kind of claim: fp32, sums in another order. Tolerance 1e-5 relative per tensor for loss and gradient (1e-6 is typical).
Adam divides by the root of the squared gradient, so where a gradient is near zero its rounding moves a weight by up to
the learning rate: weights after three updates of 1e-3 are held to 1e-4 of their norm.
"""

from __future__ import annotations

import pytest
import torch

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory):
    """The answer of one process with everything in few micro-batches, by family."""
    return {}


def answer(one_process, world, checkpoint, family, overrides):
    key = family + str(overrides)
    if key not in one_process:
        one_process[key] = torch.load(world("grpo", checkpoint(family, **overrides), "1", "--chunk-tokens", 400))
    return one_process[key]


def worst(ours, theirs):
    assert ours.keys() == theirs.keys()
    differences = {
        name: float((ours[name] - theirs[name]).norm() / theirs[name].norm())
        for name in theirs
        if theirs[name].norm() > 0
    }
    name = max(differences, key=differences.__getitem__)
    return differences[name], name


@pytest.mark.parametrize(
    ("family", "layout", "chunk", "overrides"),
    [
        ("deepseek_v3", "1", 60, {}),
        ("deepseek_v3", "tp=2,pp=2,ep=2", 100, {}),
        ("deepseek_v3", "tp=2,pp=2,ep=2,dp=2", 60, {}),
        ("deepseek_v3", "tp=2", 400, {}),
        ("deepseek_v3", "ep=2,dp=2", 100, {}),
        ("qwen2", "tp=2,pp=2", 60, {"tie_word_embeddings": True}),
        ("qwen2", "pp=2,dp=2", 100, {"tie_word_embeddings": True}),
        ("llama", "tp=2,dp=2", 100, {}),
        ("deepseek_v3", "cp=2,ep=2", 100, {}),
        ("llama", "cp=2,pp=2,vpp=2", 60, {}),
    ],
)
def test_loss_gradient_and_updates(one_process, world, checkpoint, family, layout, chunk, overrides):
    expected = answer(one_process, world, checkpoint, family, overrides)
    found = torch.load(world("grpo", checkpoint(family, **overrides), layout, "--chunk-tokens", chunk))
    if layout == "1":
        assert found["micro_batches"] > expected["micro_batches"], "the packing must differ for this to say anything"
    assert found["report"]["loss"] == pytest.approx(expected["report"]["loss"], rel=TOLERANCE)
    assert found["report"]["clipped"] == expected["report"]["clipped"] > 0
    if family == "deepseek_v3":
        # Whole tokens are counted, padding never: the numbers are the same to the last bit.
        assert found["report"]["expert_layers"] == expected["report"]["expert_layers"] == 3
        assert found["report"]["expert_load_max"] == expected["report"]["expert_load_max"] > 1
    difference, name = worst(found["gradients"], expected["gradients"])
    assert difference < TOLERANCE, name
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * TOLERANCE)
    difference, name = worst(found["weights"], expected["weights"])
    assert difference < 1e-4, name


def test_dividing_by_the_micro_batch_is_noticed(one_process, world, checkpoint):
    """The mistake these tests are there for: a mean over each micro-batch instead of the whole update."""
    expected = answer(one_process, world, checkpoint, "deepseek_v3", {})
    found = torch.load(world("grpo", checkpoint("deepseek_v3"), "1", "--chunk-tokens", 60, "--local-norm"))
    assert worst(found["gradients"], expected["gradients"])[0] > 100 * TOLERANCE
