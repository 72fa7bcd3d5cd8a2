"""The tensors of a distributed checkpoint, and the shards of every layout: each byte in one place, and back again.

Over random models of the three families and random layouts; and against what Megatron itself would store.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from parity import tiny_checkpoints
from r1mega.launch import local
from r1mega.models import hf_fields
from r1mega.models.dist_tensors import pieces_of
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Vocabulary
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout

from .test_hf_fields import QWEN2, V3

REPO = Path(local.__file__).resolve().parents[2]
LLAMA = {name: value for name, value in QWEN2.items() if "window" not in name} | {"model_type": "llama"}
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow]}


@st.composite
def models(draw) -> HfFields:
    """The fields of a small model of one of the families."""
    raw = dict(draw(st.sampled_from([V3, V3, QWEN2, LLAMA])))
    groups = draw(st.sampled_from([1, 2, 4, 6]))
    heads = groups * draw(st.integers(1, 3))
    raw |= {
        "vocab_size": draw(st.integers(1, 23)),
        "hidden_size": heads * draw(st.integers(1, 3)),
        "intermediate_size": draw(st.sampled_from([1, 4, 12])),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if raw["model_type"] != "deepseek_v3":
        if raw["model_type"] == "llama":
            raw["head_dim"] = draw(st.integers(1, 3))
        return hf_fields.parse(raw)
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_shared_experts")
    raw |= {name: draw(st.integers(1, 3)) for name in widths}
    raw |= {
        "num_key_value_heads": heads,
        "q_lora_rank": draw(st.sampled_from([None, 1, 3])),
        "first_k_dense_replace": draw(st.integers(0, raw["num_hidden_layers"])),
        "n_routed_experts": draw(st.sampled_from([1, 2, 4, 6])),
        "moe_intermediate_size": draw(st.sampled_from([1, 4, 6])),
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
    }
    return replace(hf_fields.parse(raw), num_mtp_layers=raw["num_nextn_predict_layers"])


@st.composite
def layouts(draw, fields: HfFields) -> Layout:
    """A layout that the model can be cut by, with even or uneven stages."""
    shape = fields.shape()
    tp = draw(_divisors(shape.num_heads, shape.num_kv_heads, shape.ffn_hidden_size, shape.shared_ffn_hidden_size))
    cp, pp = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    ep, etp = draw(_divisors(shape.num_experts or 1)), draw(_divisors(shape.moe_ffn_hidden_size or 1))
    dp = draw(st.integers(1, 2)) * (ep * etp // math.gcd(ep * etp, tp * cp))
    stages: tuple[int, ...] = ()
    if shape.num_layers % (pp * vpp) or draw(st.booleans()):
        cuts = sorted(draw(st.integers(0, shape.num_layers)) for _ in range(pp * vpp - 1))
        stages = tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, shape.num_layers], strict=True))
    layout = Layout(tp=tp, pp=pp, ep=ep, etp=etp, dp=dp, cp=cp, vpp=vpp, stages=stages)
    assume(not layout.problems(shape))
    return layout


def _divisors(*numbers: int) -> st.SearchStrategy[int]:
    return st.sampled_from([size for size in (4, 3, 2, 1) if all(number % size == 0 for number in numbers)])


def numbered(fields: HfFields) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, no number in it twice but where an alias repeats another."""
    tensors: dict[str, torch.Tensor] = {}
    count = 0
    for slot in slots_of(fields):
        for tensor in slot.tensors:
            if tensor.name not in tensors:
                size = math.prod(tensor.shape)
                tensors[tensor.name] = torch.arange(count, count + size, dtype=torch.int32).view(tensor.shape)
                count += size
        for alias in slot.aliases:
            tensors[alias.name] = tensors[slot.tensors[0].name]
    return tensors


def kept(fields: HfFields):
    return [slot for slot in slots_of(fields) if not slot.is_copy]


@settings(max_examples=60, **SETTINGS)
@given(models())
def test_pieces_fill_every_tensor_once_and_give_it_back(fields):
    tensors, found = numbered(fields), Counter()
    filled: dict[str, torch.Tensor] = {}
    pieces = list(pieces_of(fields))
    for piece in pieces:
        found.update(tensor.name for tensor in (*piece.tensors, *piece.aliases))
        box = piece.to_megatron([tensors[tensor.name] for tensor in piece.tensors])
        assert tuple(box.shape) == piece.shape
        back = piece.to_hf(box)
        assert [tuple(tensor.shape) for tensor in back] == [tensor.shape for tensor in piece.tensors]
        assert all(torch.equal(tensors[t.name], value) for t, value in zip(piece.tensors, back, strict=True))
        whole = filled.setdefault(piece.key, torch.full(piece.global_shape, -1, dtype=torch.int32))
        assert tuple(whole.shape) == piece.global_shape
        assert len(piece.offset) == len(piece.shape) == whole.dim()
        view = whole
        for dim, (begin, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
            view = view.narrow(dim, begin, length)  # raises where it ends beyond
        assert bool((view == -1).all()), f"{piece.key} is filled twice at {piece.offset}"
        view.copy_(box)
    assert all(bool((whole >= 0).all()) for whole in filled.values())
    assert found == Counter(tensors.keys())
    # Every number stands in exactly one place of the distributed checkpoint.
    numbers = torch.cat([whole.flatten() for whole in filled.values()])
    assert torch.equal(numbers.sort().values, torch.arange(len(numbers), dtype=torch.int32))


@settings(max_examples=150, **SETTINGS)
@given(st.data(), models())
def test_shard_then_gather_is_the_identity_and_every_byte_is_owned_once(data, fields):
    layout = data.draw(layouts(fields))
    placement, tensors = placement_of(fields, layout), numbered(fields)
    held: dict[tuple[int, int, str], torch.Tensor] = {}
    # Fill: what each rank holds, under its own module's names.
    for slot in kept(fields):
        sources = [tensors[tensor.name] for tensor in slot.tensors]
        count = placement.num_shards(slot)
        for rank in range(layout.world_size):
            shard = placement.shard_on(slot, rank)
            if shard is not None:
                key = rank, placement.model_index(slot), placement.local_name(slot)
                assert key not in held, f"{key} is two parameters"
                held[key] = slot.op.to_megatron(sources, shard, count)
    # Gather: from the owner of each shard.
    owned = 0
    gathered: dict[str, torch.Tensor] = {}
    for slot in kept(fields):
        where = placement.model_index(slot), placement.local_name(slot)
        shards = [held[(placement.owner(slot, shard), *where)] for shard in range(placement.num_shards(slot))]
        assert len({shard.shape for shard in shards}) == 1
        back = slot.op.to_hf(shards)
        for tensor, value in zip(slot.tensors, back, strict=True):
            assert tensor.name not in gathered
            gathered[tensor.name] = value
        gathered |= {alias.name: back[0] for alias in slot.aliases}
        padding = 0
        if isinstance(slot.op, Vocabulary):
            padding = -fields["vocab_size"] % len(shards) * fields["hidden_size"]
            assert not torch.cat(shards)[fields["vocab_size"] :].any()
        owned += sum(shard.numel() for shard in shards) - padding
    assert gathered.keys() == tensors.keys()
    assert all(torch.equal(gathered[name], tensors[name]) for name in tensors)
    aliases = {alias.name for slot in kept(fields) for alias in slot.aliases}
    assert owned == sum(value.numel() for name, value in tensors.items() if name not in aliases)


@settings(max_examples=150, **SETTINGS)
@given(st.data(), models())
def test_the_ranks_that_hold_a_shard(data, fields):
    layout = data.draw(layouts(fields))
    placement = placement_of(fields, layout)
    copies = layout.dp * layout.cp
    for slot in slots_of(fields):
        holders: dict[int, list[int]] = {}
        for rank in range(layout.world_size):
            if (shard := placement.shard_on(slot, rank)) is not None:
                holders.setdefault(shard, []).append(rank)
        assert sorted(holders) == list(range(placement.num_shards(slot)))
        # An expert is copied over its own data-parallel ranks; what is not cut, over the tensor ranks too.
        expected = layout.expert_dp if slot.expert is not None else copies * (layout.tp if slot.axis is None else 1)
        for shard, ranks in holders.items():
            assert len(ranks) == expected
            assert placement.owner(slot, shard) == min(ranks)
            assert {rank // layout.per_stage for rank in ranks} == {placement.stage(slot)}
        owners = [placement.owner(slot, shard) for shard in holders]
        assert len(set(owners)) == len(owners)


@settings(max_examples=60, **SETTINGS)
@given(st.data(), models())
def test_layers_and_experts_are_counted_from_nought_in_every_chunk(data, fields):
    layout = data.draw(layouts(fields))
    placement = placement_of(fields, layout)
    layers = fields["num_hidden_layers"]
    counts = layout.stages or (layers // layout.num_chunks,) * layout.num_chunks
    homes = [(chunk, layer) for chunk, count in enumerate(counts) for layer in range(count)]
    for spec in ("torch", "te"):
        names: dict[tuple[int, int, int], list[str]] = {}
        for slot in slots_of(fields):
            chunk = placement.stage(slot) + layout.pp * placement.model_index(slot)
            name = placement.local_name(slot, spec)
            if slot.layer is not None and slot.name.startswith("decoder.layers."):
                assert (chunk, int(name.split(".")[2])) == homes[slot.layer]
            elif slot.place != "layer":
                assert chunk == (0 if slot.place == "first" else layout.num_chunks - 1)
            for rank in range(layout.world_size):
                # A copy may be the very table that its chunk holds anyway.
                if placement.shard_on(slot, rank) is not None and not slot.is_copy:
                    names.setdefault((rank, placement.model_index(slot)), []).append(name)
        assert all(len(set(held)) == len(held) for held in names.values())
        per_rank = fields["n_routed_experts"] // layout.ep if fields.is_moe else 0
        for held in names.values():
            routed = {int(name.split("local_experts.")[1].split(".")[0]) for name in held if "local_experts." in name}
            assert routed in (set(), set(range(per_rank)))


@pytest.mark.parametrize("tied", [False, True])
def test_the_tables_that_multi_token_prediction_repeats_have_a_place(tied):
    """Its embedding and its output table stand in the checkpoint again; tied, both repeat the embedding."""
    fields = replace(hf_fields.parse(V3 | {"tie_word_embeddings": tied}), num_mtp_layers=1)
    repeated = {a.name: piece.tensors[0].name for piece in pieces_of(fields) for a in piece.aliases}
    assert repeated == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "model.embed_tokens.weight" if tied else "lm_head.weight",
    }


def test_another_layout_does_not_fit():
    """Negative control: shards that one layout made are not put together by another."""
    fields = hf_fields.parse(QWEN2 | {"vocab_size": 10, "hidden_size": 12, "intermediate_size": 8})
    qkv = next(slot for slot in slots_of(fields) if slot.name.endswith("linear_qkv.weight"))
    tensors = [torch.arange(math.prod(t.shape)).view(t.shape) for t in qkv.tensors]
    shards = [qkv.op.to_megatron(tensors, index, 2) for index in range(2)]
    assert all(torch.equal(*pair) for pair in zip(qkv.op.to_hf(shards), tensors, strict=True))
    assert not torch.equal(qkv.op.to_hf(shards[::-1])[0], tensors[0])
    with pytest.raises(RuntimeError):
        qkv.op.to_hf(shards[:1])


MEGATRON = """
import json, sys
from pathlib import Path
import torch
from r1mega.models import hf_fields
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

found = {}
for folder in sys.argv[2:]:
    world = groups.initialize(Layout(), "cpu", seed=0, timeout_minutes=1)
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from r1mega.models.build import build_chunks
    from r1mega.models.hf_config import ModelOptions
    (model,) = build_chunks(hf_fields.read(folder), world, ModelOptions(params_dtype=torch.bfloat16))
    boxes = found[folder] = []
    for name, value in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
        if name.endswith("_extra_state"):
            continue
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for box in built if isinstance(built, list) else [built]:
            shape = (1,) * box.prepend_axis_num + tuple(box.local_shape)
            boxes.append([box.key, box.global_shape, box.global_offset, shape, str(box.dtype)])
    groups.release()
Path(sys.argv[1]).write_text(json.dumps(found))
groups.shutdown()
"""


MODELS = {
    "mtp": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
    "mtp-tied": ("deepseek_v3", {"num_nextn_predict_layers": 1, "tie_word_embeddings": True}),
    "no-query-rank": ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    "biases": ("qwen2", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "plain": ("llama", {"num_key_value_heads": 1}),
}


def test_megatron_would_store_the_same(tmp_path):
    """Names, shapes and boxes of Megatron's own sharded_state_dict for a model of each kind."""
    folders = [tmp_path / name for name in MODELS]
    for folder, (family, changes) in zip(folders, MODELS.values(), strict=True):
        folder.mkdir()
        config = {"model_type": family, "rms_norm_eps": 1e-6, **tiny_checkpoints.SHAPES[family], **changes}
        (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "found.json"
    asked = subprocess.run(
        [sys.executable, "-c", MEGATRON, str(out), *map(str, folders)],
        env=os.environ | local.worker_env("cpu", 1) | {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    found = json.loads(out.read_text())
    for folder in folders:
        fields = hf_fields.read(folder)
        ours = sorted(
            (piece.key, piece.global_shape, piece.offset, piece.shape, _dtype(piece)) for piece in pieces_of(fields)
        )
        theirs = sorted(
            (key, tuple(whole), tuple(offset), tuple(shape), dtype)
            for key, whole, offset, shape, dtype in found[str(folder)]
        )
        assert ours == theirs, folder.name
        assert len(ours) > 4 * fields["num_hidden_layers"]


def _dtype(piece) -> str:
    return "torch.float32" if piece.slot.fp32 else "torch.bfloat16"
