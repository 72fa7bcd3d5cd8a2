"""Publishing over process groups: every engine rank receives every tensor as the checkpoint has it, and again after an
engine was started again or died in mid-publish."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from r1mega.models.fp8_blocks import SCALE_SUFFIX, quantize

# Who owns what: all ranks (gloo), or the lowest of each stage (as over NCCL).
CASES = [
    ("deepseek_v3", {}, "tp=2,pp=2,ep=2", ["tp=2,ep=2"], "bf16", 4),
    ("deepseek_v3", {"mtp": True}, "tp=2,pp=2,ep=2", ["tp=2,ep=2"], "bf16", 2),
    ("qwen2", {"tie_word_embeddings": True}, "tp=2,pp=2,vpp=2", ["1", "1"], "fp32", 4),
    ("llama", {}, "dp=3", ["tp=2"], "bf16", 1),
]
# Blocks that a cut of two tensor ranks runs through, and that a matrix ends in.
WIDE = {"hidden_size": 192, "intermediate_size": 288, "moe_intermediate_size": 144}


def check(found: dict, source, dtype: str, *, tied: bool = False, layers: int = 4) -> None:
    tensors = load_file(source / "model.safetensors")
    kept = {
        name
        for name in tensors
        if not (tied and name == "lm_head.weight") and not name.startswith(f"model.layers.{layers}.")
    }
    for rank in (rank for engine in found["received"] for rank in engine):
        assert {name for name in rank if not name.endswith(SCALE_SUFFIX)} == kept
        for name, tensor in rank.items():
            if name.endswith(SCALE_SUFFIX):
                continue
            if dtype == "fp8" and name + SCALE_SUFFIX in rank:
                blocks, scales = quantize(tensors[name])
                assert torch.equal(tensor.view(torch.uint8), blocks.view(torch.uint8)), name
                assert torch.equal(rank[name + SCALE_SUFFIX], scales), name
                continue
            assert tensor.dtype in (torch.float32, torch.float32 if dtype == "fp32" else torch.bfloat16)
            assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


@pytest.mark.parametrize(("family", "options", "layout", "engines", "dtype", "senders"), CASES)
def test_every_engine_rank_receives_every_tensor(
    checkpoint, world, family, options, layout, engines, dtype, senders
) -> None:
    source = checkpoint(family, num_hidden_layers=4, **options)
    few = ("--one-owner",) if senders < 3 else ()
    found = torch.load(
        world("broadcast", source, layout, "--engines", *engines, "--publish", dtype, "--bucket-bytes", 60_000, *few)
    )
    check(found, source, dtype, tied="tie_word_embeddings" in options)
    # Once for each sender at first, and again for the engine that was started again; the third publish needs none.
    assert found["joins"] == 2 * senders
    assert found["updates"] % 3 == 0 and found["updates"] // 3 > 4


@pytest.mark.parametrize("owners", [(), ("--one-owner",)])
def test_fp8_blocks_are_of_whole_tensors(checkpoint, world, owners) -> None:
    source = checkpoint("deepseek_v3", num_hidden_layers=3, **WIDE)
    options = ("--engines", "1", "--publish", "fp8", "--bucket-bytes", 200_000)
    found = torch.load(world("broadcast", source, "tp=2,ep=2", *options, *owners))
    check(found, source, "fp8", layers=3)
    (((received,),),) = (found["received"],)
    assert sum(name.endswith(SCALE_SUFFIX) for name in received) > 20


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


@pytest.mark.parametrize("owners", [(), ("--one-owner",)])
def test_all_ranks_hear_of_one_that_cannot_make_blocks(checkpoint, world, owners) -> None:
    """Before any server waits for them; nobody hangs."""
    source = checkpoint("qwen2", num_hidden_layers=4)
    options = ("--engines", "1", "--publish", "fp8", "--bucket-bytes", 60_000, "--diverge")
    found = torch.load(world("broadcast", source, "pp=2", *options, *owners))
    (heard,) = set(found["heard"])
    assert heard.startswith("weights 1 did not arrive, published twice:\nmodel.layers.3.mlp.down_proj.weight: ")
    assert heard.endswith("FP8 cannot hold it; the training has diverged, go back")
