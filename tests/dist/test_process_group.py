"""Publishing over process groups: every engine rank receives every tensor as the checkpoint has it, and again after an
engine was started again or died in mid-publish."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

CASES = [
    ("deepseek_v3", {}, "tp=2,pp=2,ep=2", ["tp=2,ep=2"], "bf16"),
    ("qwen2", {"tie_word_embeddings": True}, "tp=2,pp=2,vpp=2", ["1", "1"], "fp32"),
    ("llama", {}, "dp=3", ["tp=2"], "bf16"),
]


def check(found: dict, source, dtype: str, *, tied: bool = False) -> None:
    tensors = load_file(source / "model.safetensors")
    kept = {name for name in tensors if not (tied and name == "lm_head.weight")}
    for rank in (rank for engine in found["received"] for rank in engine):
        assert set(rank) == kept
        for name, tensor in rank.items():
            assert tensor.dtype in (torch.float32, torch.bfloat16 if dtype == "bf16" else torch.float32)
            assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


@pytest.mark.parametrize(("family", "options", "layout", "engines", "dtype"), CASES)
def test_every_engine_rank_receives_every_tensor(checkpoint, world, family, options, layout, engines, dtype) -> None:
    source = checkpoint(family, num_hidden_layers=4, **options)
    found = torch.load(
        world("broadcast", source, layout, "--engines", *engines, "--publish", dtype, "--bucket-bytes", 60_000)
    )
    check(found, source, dtype, tied="tie_word_embeddings" in options)
    # Once for each stage at first, and again for the engine that was started again; the third publish needs none.
    stages = 2 if "pp=2" in layout else 1
    assert found["joins"] == 2 * stages
    assert found["updates"] % 3 == 0 and found["updates"] // 3 > 4


def test_an_engine_dies_in_mid_publish(checkpoint, world) -> None:
    """Four receivers: what one of them got from another that is gone must not keep it waiting."""
    source = checkpoint("qwen2", num_hidden_layers=4)
    found = torch.load(
        world("broadcast", source, "pp=2", "--engines", "tp=2", "tp=2", "--bucket-bytes", 60_000, "--kill")
    )
    check(found, source, "fp32")
    assert found["joins"] == 2 * 2


def test_one_bit_is_another(checkpoint, world) -> None:
    """Found by the checksums, in groups that stay; so four publishes of as many broadcasts instead of three."""
    source = checkpoint("qwen2", num_hidden_layers=4)
    options = ("--engines", "tp=2", "--bucket-bytes", 60_000)
    found = torch.load(world("broadcast", source, "pp=2", *options, "--flip"))
    check(found, source, "fp32")
    assert found["joins"] == 2
    assert found["updates"] % 4 == 0 and found["updates"] // 4 > 4
