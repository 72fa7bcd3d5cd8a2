"""The multi-token-prediction layer in RL: it may learn, the policy must not learn from it."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("layout", ["1", "tp=2,pp=2"])
def test_the_layer_learns_alone(checkpoint, world, layout):
    found = torch.load(world("mtp_alone", checkpoint("deepseek_v3", mtp=True), layout))
    none, alone, joint = found["none"], found["alone"], found["joint"]
    assert none.keys() == alone.keys() == joint.keys()
    layer = {name for name in none if name.startswith("model.layers.4.")}
    for name in none.keys() - layer:
        assert torch.equal(alone[name], none[name]), f"{name} is moved by the loss two tokens ahead"
        assert not torch.equal(joint[name], none[name]), f"{name}: the control shows nothing"
    for name in layer:
        # The same layer on the same hidden states: whether gradients go on below it does not matter to its own.
        assert torch.allclose(alone[name], joint[name], rtol=1e-5, atol=1e-7 * float(joint[name].norm()))
        assert not none[name].any()
    assert sum(bool(alone[name].any()) for name in layer) > len(layer) // 2
