"""Scores of reward models and the gradients of their losses, against transformers and torch's autograd.

Kind of claim: fp32, sums in another order. Scores lie around 1: 1e-5 absolute (typical: 1e-6). Gradients 1e-5 of each
tensor's norm between layouts and 1e-4 against transformers, whose attention and experts add in another order as well.
The negative control is a gradient that tensor ranks sum although each has the whole of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity.mtp_reference import split_experts
from r1mega.algo.preference import pairwise_loss, pointwise_loss
from r1mega.launch import local
from r1mega.parallel.layout import Layout

RANKS = Path(__file__).with_name("reward_ranks.py")
SCORES, LAYOUTS, TRANSFORMERS = 1e-5, 1e-5, 1e-4


@pytest.fixture(scope="module")
def ranks(nursery, checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """`ranks(family, layout, *options)` -> the folder of what the ranks wrote; each made once."""
    made: dict[tuple, Path] = {}

    def run(family: str, layout: str, *options: str, **overrides) -> Path:
        key = (family, layout, options, str(overrides))
        if key not in made:
            out = made[key] = tmp_path_factory.mktemp("ranks")
            hf = checkpoint(family, **overrides)
            argv = [sys.executable, str(RANKS), "--hf", str(hf), "--layout", layout, "--out", str(out), *options]
            result = nursery.run_world(
                argv, Layout.parse(layout).world_size, log_dir=out / "logs", env=local.worker_env("cpu", 1)
            )
            assert result.exit_code == 0, result.message
        return made[key]

    return run


def worst(ours: dict, theirs: dict) -> tuple[float, str]:
    """The largest difference of a tensor, over its norm; of one without, over the median's."""
    assert ours.keys() == theirs.keys()
    norms = {name: float(value.norm()) for name, value in theirs.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    found = {
        name: float((ours[name] - theirs[name]).norm()) / (norms[name] if norms[name] > 1e-6 * typical else typical)
        for name in theirs
    }
    name = max(found, key=found.__getitem__)
    return found[name], name


FAMILIES = [("deepseek_v3", {}), ("qwen2", {"tie_word_embeddings": True}), ("llama", {})]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_scores_and_gradients_are_those_of_transformers(ranks, family, overrides):
    from transformers import AutoModelForSequenceClassification

    out = ranks(family, "1", **overrides)
    found = torch.load(out / "answer", weights_only=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        out / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__.endswith("ForSequenceClassification")
    model.get_input_embeddings().padding_idx = None
    scores = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in found["items"]])
    assert torch.allclose(torch.tensor(found["scores"], dtype=torch.float32), scores, rtol=0, atol=SCORES)
    assert scores.std() > 100 * SCORES, "scores that are all alike say nothing"
    losses = {
        "pairwise": pairwise_loss(scores, len(scores) // 2)[0],
        "pointwise": pointwise_loss(scores, found["labels"], len(scores))[0],
    }
    by_torch = torch.nn.functional.binary_cross_entropy_with_logits(scores, found["labels"])
    assert losses["pointwise"].item() == pytest.approx(by_torch.item(), rel=1e-6)
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        theirs = {
            name: parameter.grad[place].clone()
            for whole, parameter in model.named_parameters()
            for name, place in split_experts(whole, parameter)
        }
        report, ours = found[name]
        assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
        difference, where = worst(ours, theirs)
        assert difference < TRANSFORMERS, where


@pytest.mark.parametrize(
    ("family", "layout", "overrides"),
    [
        ("deepseek_v3", "tp=2,pp=2,ep=2", {}),
        pytest.param("deepseek_v3", "cp=2,ep=2", {}, marks=pytest.mark.extended),
        ("qwen2", "tp=2", {"tie_word_embeddings": True}),
        pytest.param("llama", "dp=2,pp=2,vpp=2", {}, marks=pytest.mark.extended),
    ],
)
def test_every_layout_scores_and_learns_alike(ranks, family, layout, overrides):
    expected, found = (
        torch.load(ranks(family, layout, **overrides) / "answer", weights_only=False) for layout in ("1", layout)
    )
    assert found["scores"] == pytest.approx(expected["scores"], rel=0, abs=SCORES)
    assert found["frozen"] == pytest.approx(found["scores"], rel=0, abs=SCORES)
    for name in ("pairwise", "pointwise"):
        assert found[name][0]["loss"] == pytest.approx(expected[name][0]["loss"], rel=LAYOUTS)
        assert found[name][0]["right"] == expected[name][0]["right"]
        difference, where = worst(found[name][1], expected[name][1])
        assert difference < LAYOUTS, (name, where)


def test_a_gradient_summed_over_tensor_ranks_is_noticed(ranks):
    expected = torch.load(ranks("qwen2", "1", tie_word_embeddings=True) / "answer", weights_only=False)
    found = torch.load(ranks("qwen2", "tp=2", "--doubled", tie_word_embeddings=True) / "answer", weights_only=False)
    assert found["scores"] == pytest.approx(expected["scores"], rel=0, abs=SCORES)
    assert worst(found["pairwise"][1], expected["pairwise"][1])[0] > 100 * LAYOUTS
