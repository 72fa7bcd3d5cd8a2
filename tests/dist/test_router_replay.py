"""Experts replayed: a router's own choice given back to it changes nothing, another one does.

That any choice gives what it should, at other layouts too, is the parity matrix's to say (family deepseek_v3_replay).
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("deepseek_v3")


def test_a_choice_of_its_own_changes_no_bit(source, world, tmp_path):
    own = world("own_choices", source, "1")
    plain, given = torch.load(world("replay", source, "1")), torch.load(world("replay", source, "1", "--choices", own))
    assert torch.equal(plain["logprobs"], given["logprobs"])
    assert all(torch.equal(given["gradients"][name], gradient) for name, gradient in plain["gradients"].items())
    report = given["report"]
    # Padding and last tokens are not among the tokens replayed; recorded at other packs, rounding may choose otherwise.
    assert (report["replayed"], report["replayed_otherwise"]) == (3 * given["tokens"], 0)
    assert report["expert_load_max"] == plain["report"]["expert_load_max"]
    assert "replayed" not in plain["report"]

    # negative control: the same experts, for the token after
    shifted = tmp_path / "shifted"
    torch.save([choices.roll(1, 0) for choices in torch.load(own)], shifted)
    late = torch.load(world("replay", source, "tp=2,cp=2", "--choices", shifted))
    assert (late["logprobs"] - plain["logprobs"]).abs().max() > 0.1
    assert late["report"]["replayed"] == 3 * given["tokens"]
    assert late["report"]["replayed_otherwise"] > 0.5 * late["report"]["replayed"]
