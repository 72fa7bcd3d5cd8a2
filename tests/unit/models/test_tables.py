"""The tables: the 671B checkpoint counted tensor by tensor, and shard and gather as inverses at any layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.models import hf_fields
from r1mega.models.param_map import QKV, Cut, GateUp, Vocabulary, Whole
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout

from .test_hf_fields import QWEN2, V3


def test_deepseek_v3_has_the_published_size():
    """671,026,419,200 elements: 671,026,404,352 parameters and 14,848 gate biases in fp32 (main model, bf16)."""
    slots = slots_of(hf_fields.parse(V3))
    tensors = {tensor.name: tensor.shape for slot in slots for tensor in slot.tensors}
    assert sum(math.prod(shape) for shape in tensors.values()) == 671_026_419_200
    biases = [tensor for slot in slots if slot.fp32 for tensor in slot.tensors]
    assert sum(math.prod(tensor.shape) for tensor in biases) == 58 * 256
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    # Each tensor of the checkpoint stands in one slot, each parameter of Megatron in one slot.
    assert sum(len(slot.tensors) for slot in slots) == len(tensors)
    assert len({slot.name for slot in slots}) == len(slots)


def test_tied_embeddings_are_exported_once():
    slots = slots_of(hf_fields.parse(QWEN2))
    holders = [slot for slot in slots if slot.tensors[0].name == "model.embed_tokens.weight"]
    assert [slot.is_copy for slot in holders] == [False, True]
    # Qwen2.5-Math-1.5B: 1.544 B parameters with the table counted once.
    total = sum(math.prod(t.shape) for slot in slots if not slot.is_copy for t in slot.tensors)
    assert total == 1_543_714_304


@pytest.mark.parametrize("layout", ["tp=8,pp=1,ep=8", "ep=64,dp=64", "tp=4,ep=16,etp=2,dp=8", "tp=2,etp=2,ep=4,dp=4"])
def test_every_shard_has_one_first_owner_that_holds_it(layout):
    fields = hf_fields.parse(V3)
    parsed = Layout.parse(layout)
    placement = placement_of(fields, parsed)
    for slot in slots_of(fields)[::97]:
        owners = [placement.owner(slot, shard) for shard in range(placement.num_shards(slot))]
        assert len(set(owners)) == len(owners)
        holders = [(rank, placement.shard_on(slot, rank)) for rank in range(parsed.world_size)]
        for shard, owner in enumerate(owners):
            assert owner == min(rank for rank, held in holders if held == shard)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5))
def test_shard_then_gather_is_the_identity(size, groups_each, queries, vocab, width):
    groups = size * groups_each
    cases = [
        (Whole(), [random(3, 5)]),
        (Cut(0), [random(size * 3, 5)]),
        (Cut(1), [random(5, size * 3)]),
        (Vocabulary(vocab), [random(vocab, 4)]),
        (GateUp(), [random(size * 2, 3), random(size * 2, 3) + 1]),
        (
            QKV(groups * queries, groups, width),
            [random(groups * queries * width, 3), random(groups * width, 3), random(groups * width, 3) + 1],
        ),
        (QKV(groups * queries, groups, width), [random(groups * n * width) for n in (queries, 1, 1)]),
    ]
    for op, tensors in cases:
        shards = [op.to_megatron(tensors, index, size) for index in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        back = op.to_hf(shards)
        assert len(back) == len(tensors)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(back, tensors, strict=True)), op


def test_qkv_by_hand():
    """Four query heads in two groups of width 1: group 0 is q0 q1 k0 v0, group 1 is q2 q3 k1 v1."""
    q, k, v = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    op = QKV(num_heads=4, num_groups=2, head_dim=1)
    assert op.to_megatron([q, k, v], 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert op.to_megatron([q, k, v], 1, 2).tolist() == [2, 3, 11, 21]


def test_gate_up_by_hand():
    gate, up = torch.tensor([[0.0], [1]]), torch.tensor([[10.0], [11]])
    assert GateUp().to_megatron([gate, up], 1, 2).flatten().tolist() == [1, 11]


def test_vocabulary_is_padded_with_zeros():
    table = torch.ones(5, 2)
    last = Vocabulary(5).to_megatron([table], 3, 4)
    assert last.shape == (2, 2)
    assert last.sum() == 0
