"""The shape of a model's choices of experts. What is told wrongly of them: tests/unit/rollout/test_sglang.py."""

from __future__ import annotations

import base64

import pytest
import torch

from r1mega.models import hf_fields
from r1mega.models.expert_choices import ExpertChoices

from .test_hf_fields import QWEN2, V3


def test_deepseek_v3() -> None:
    """61 layers, the first 3 of them dense; 8 of 256 experts, whose numbers fit a byte."""
    choices = ExpertChoices.of(hf_fields.parse(V3))
    assert choices == ExpertChoices(num_layers=61, first_moe_layer=3, num_experts=256, top_k=8)
    assert choices.dtype == torch.uint8
    assert list(hf_fields.parse(QWEN2).moe_layers) == []


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, torch.uint8), (257, torch.int16), (384, torch.int16)])
def test_every_expert_has_a_number(num_experts: int, dtype: torch.dtype) -> None:
    choices = ExpertChoices(num_layers=2, first_moe_layer=1, num_experts=num_experts, top_k=2)
    told = torch.tensor([[[0, 0], [num_experts - 1, 0]], [[0, 0], [0, num_experts - 2]]], dtype=torch.int32)
    found = choices.decode(base64.b64encode(told.numpy().tobytes()).decode(), num_tokens=2)
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.int32), told[:, 1:])


def test_no_token() -> None:
    """A prompt of one token and no response."""
    assert ExpertChoices(2, 1, 8, 2).decode("", num_tokens=0).shape == (0, 1, 2)
