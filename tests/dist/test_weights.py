"""Checkpoint -> Megatron at a layout -> checkpoint loses no bit, and random weights do not know the layout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "layout", "dtype", "overrides"),
    [
        ("deepseek_v3", "tp=2,pp=2,ep=2", "bfloat16", {}),
        ("deepseek_v3", "tp=2,ep=2,etp=2,dp=2", "float32", {"q_lora_rank": None}),
        ("qwen2", "tp=2,pp=2", "bfloat16", {"tie_word_embeddings": True}),
        ("llama", "tp=2,dp=2", "float32", {}),
    ],
)
def test_round_trip_is_bit_identical(checkpoint, world, family, layout, dtype, overrides):
    source = checkpoint(family, dtype=dtype, **overrides)
    # Held in fp32 whatever the source: the export goes back to the dtype each tensor came in.
    back = world("round_trip", source, layout, "--dtype", "float32")
    before, after = tensors_of(source), tensors_of(back)
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].contiguous().view(torch.uint8)), name
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(before), "the export of several files has an index of all tensors"


def test_transformers_reads_the_export(checkpoint, world):
    from transformers import AutoModelForCausalLM

    source = checkpoint("deepseek_v3")
    back = world("round_trip", source, "pp=2,ep=2,dp=2")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (back, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_random_weights_do_not_depend_on_the_layout(checkpoint, world):
    source = checkpoint("deepseek_v3")
    one = torch.load(world("random_weights", source, "1"))
    many = torch.load(world("random_weights", source, "tp=2,pp=2,ep=2"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    gate = one["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert abs(float(gate.std()) / 0.08 - 1) < 0.1, "initializer_range of the checkpoint's config"
