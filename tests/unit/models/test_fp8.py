"""What FP8 asks of a model and a layout, before a GPU is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity.tiny_checkpoints import FP8_SHAPES
from r1mega.models import cards, fp8, hf_fields
from r1mega.parallel.layout import Layout


def problems(folder: Path, layout: str) -> list[str]:
    return fp8.problems(hf_fields.read(folder), Layout.parse(layout))


def test_deepseek_v3_fits_at_its_own_layouts():
    fields = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True)
    assert fp8.problems(fields, Layout.parse("pp=16,ep=64,dp=64")) == []
    assert fp8.problems(fields, Layout.parse("tp=8,pp=16,ep=8,dp=8")) == []


@pytest.mark.parametrize(
    ("family", "layout", "changes", "named"),
    [
        ("qwen2", "tp=2", {}, []),
        ("qwen2", "1", {"intermediate_size": 520}, ["intermediate_size / tp = 520"]),
        ("qwen2", "tp=2", {"hidden_size": 192}, ["hidden_size = 192 and tp = 2"]),
        ("qwen2", "1", {"hidden_size": 192}, []),
        ("deepseek_v3", "1", {}, []),
        ("deepseek_v3", "ep=2,dp=2", {}, []),
        ("deepseek_v3", "tp=2", {}, ["kv_lora_rank = 112 and tp = 2"]),
        ("deepseek_v3", "tp=2", {"kv_lora_rank": 128}, []),
        ("deepseek_v3", "tp=2,ep=2", {"kv_lora_rank": 128, "q_lora_rank": 64}, ["q_lora_rank = 64 and tp = 2"]),
    ],
)
def test_widths_that_do_not_fit_are_named(checkpoint, family, layout, changes, named):
    """As Transformer Engine 2.11 on an H200 refused kv_lora_rank = 112 at tp = 2, and took it at tp = 1."""
    found = problems(checkpoint(family, **FP8_SHAPES[family] | changes), layout)
    assert len(found) == len(named)
    for message, part in zip(found, named, strict=True):
        assert message.startswith("precision.fp8: got ") and part in message
        assert "must be a multiple of" in message and "precision=bf16" in message
