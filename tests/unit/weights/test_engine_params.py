"""The table of an engine's parameters: tiny cases worked out by hand, and what holds of every layout."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.tiny_checkpoints import SHAPES
from r1mega.models.hf_fields import HfFields, parse
from r1mega.models.tables import slots_of
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, EngineParam, Part, engine_params

CPU = EngineBuild(device="cpu")


def fields_of(family: str, **overrides: Any) -> HfFields:
    return parse({"model_type": family, "rms_norm_eps": 1e-6, **SHAPES[family], **overrides})


def params_of(fields: HfFields, layout: str, rank: int, build: EngineBuild | None = None) -> dict[str, EngineParam]:
    return {param.name: param for param in engine_params(fields, EngineLayout.parse(layout), rank, build)}


def pieces(param: EngineParam) -> list[tuple]:
    """(tensor's last words, offset, shape, place) of each part."""
    return [(".".join(part.tensor.split(".")[-2:]), part.offset, part.shape, part.at) for part in param.parts]


def test_a_rank_of_qwen2_by_hand():
    # 4 heads and 2 KV heads of 16 (hidden 64), 96 rows of MLP, 323 tokens padded to 384; the second of two ranks.
    held = params_of(fields_of("qwen2", num_hidden_layers=1), "tp=2", 1)
    assert {name: param.shape for name, param in held.items()} == {
        "model.embed_tokens.weight": (192, 64),
        "model.layers.0.self_attn.qkv_proj.weight": (64, 64),
        "model.layers.0.self_attn.qkv_proj.bias": (64,),
        "model.layers.0.self_attn.o_proj.weight": (64, 32),
        "model.layers.0.mlp.gate_up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 48),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.norm.weight": (64,),
        "lm_head.weight": (192, 64),
    }
    assert pieces(held["model.embed_tokens.weight"]) == [("embed_tokens.weight", (192, 0), (131, 64), (0, 0))]
    assert pieces(held["model.layers.0.self_attn.qkv_proj.bias"]) == [
        ("q_proj.bias", (32,), (32,), (0,)),
        ("k_proj.bias", (16,), (16,), (32,)),
        ("v_proj.bias", (16,), (16,), (48,)),
    ]
    assert pieces(held["model.layers.0.mlp.gate_up_proj.weight"]) == [
        ("gate_proj.weight", (48, 0), (48, 64), (0, 0)),
        ("up_proj.weight", (48, 0), (48, 64), (48, 0)),
    ]
    assert pieces(held["model.layers.0.mlp.down_proj.weight"]) == [("down_proj.weight", (0, 48), (64, 48), (0, 0))]


def test_more_ranks_than_kv_heads_hold_the_same_head():
    fields = fields_of("llama", num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1, head_dim=8)
    firsts = [
        [part.offset[0] for part in params_of(fields, "tp=4", rank)["model.layers.0.self_attn.qkv_proj.weight"].parts]
        for rank in range(4)
    ]
    assert firsts == [[0, 0, 0], [16, 0, 0], [32, 8, 8], [48, 8, 8]]
    assert "model.layers.0.self_attn.qkv_proj.bias" not in params_of(fields, "tp=4", 0)


def test_on_cpu_what_the_ranks_do_not_divide_is_padded():
    fields = fields_of("llama", num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1, head_dim=8)
    # KV heads to 4, query heads as they follow to 16, MLP 96 to 4 x 32: the last rank has nothing but padding there.
    last = params_of(fields, "tp=4", 3, CPU)
    assert last["model.layers.0.self_attn.qkv_proj.weight"].shape == ((4 + 1 + 1) * 8, 64)
    assert last["model.layers.0.self_attn.qkv_proj.weight"].parts == ()
    assert last["model.layers.0.mlp.down_proj.weight"].shape == (64, 32)
    assert last["model.layers.0.mlp.down_proj.weight"].parts == ()
    held = [params_of(fields, "tp=4", rank, CPU)["model.layers.0.mlp.down_proj.weight"] for rank in range(4)]
    assert [len(param.parts) for param in held] == [1, 1, 1, 0]


def test_tied_embeddings_are_one_parameter():
    tied = params_of(fields_of("qwen2", tie_word_embeddings=True), "tp=2", 0)
    assert "lm_head.weight" not in tied and "model.embed_tokens.weight" in tied


def test_latent_attention_by_hand():
    # 4 heads, of 16 + 8 for queries, 16 + 12 for keys and values; latents of 24 and 16 + 8; the second of two ranks.
    held = params_of(fields_of("deepseek_v3"), "tp=2", 1)
    prefix = "model.layers.0.self_attn"
    assert pieces(held[f"{prefix}.fused_qkv_a_proj_with_mqa.weight"]) == [
        ("q_a_proj.weight", (0, 0), (24, 64), (0, 0)),
        ("kv_a_proj_with_mqa.weight", (0, 0), (24, 64), (24, 0)),
    ]
    assert pieces(held[f"{prefix}.q_b_proj.weight"]) == [("q_b_proj.weight", (48, 0), (48, 24), (0, 0))]
    assert pieces(held[f"{prefix}.kv_b_proj.weight"]) == [("kv_b_proj.weight", (56, 0), (56, 16), (0, 0))]
    assert pieces(held[f"{prefix}.o_proj.weight"]) == [("o_proj.weight", (0, 24), (64, 24), (0, 0))]
    whole = params_of(fields_of("deepseek_v3", q_lora_rank=None), "tp=2", 1)
    assert whole[f"{prefix}.q_proj.weight"].shape == (48, 64)
    assert whole[f"{prefix}.kv_a_proj_with_mqa.weight"].shape == (24, 64)
    assert f"{prefix}.fused_qkv_a_proj_with_mqa.weight" not in whole


def test_data_parallel_attention_cuts_attention_less():
    # Two of four ranks share attention; MLPs, experts and the output table are cut as before.
    held = params_of(fields_of("deepseek_v3"), "tp=4,attn_dp=2", 3)
    prefix = "model.layers.1"
    assert held[f"{prefix}.self_attn.q_b_proj.weight"].parts[0].offset == (48, 0)
    assert held["model.embed_tokens.weight"].shape == (192, 64) and held["lm_head.weight"].shape == (96, 64)
    assert held[f"{prefix}.mlp.experts.w2_weight"].shape == (8, 64, 8)
    build = EngineBuild(dp_lm_head=True, whole_dense_mlps=True, whole_shared_experts=True)
    held = params_of(fields_of("deepseek_v3"), "tp=4,attn_dp=2", 3, build)
    assert held["lm_head.weight"].shape == (192, 64)
    assert held["model.layers.0.mlp.gate_up_proj.weight"].shape == (192, 64)
    assert held[f"{prefix}.mlp.shared_experts.down_proj.weight"].shape == (64, 32)


def test_experts_by_hand():
    # 8 experts of 32 rows; the third of four ranks, in pairs: experts 4 to 7, the first half of each.
    held = params_of(fields_of("deepseek_v3"), "tp=4,ep=2", 2)
    prefix = "model.layers.1.mlp"
    w13, w2 = held[f"{prefix}.experts.w13_weight"], held[f"{prefix}.experts.w2_weight"]
    assert (w13.shape, w2.shape) == ((4, 32, 64), (4, 64, 16))
    assert w13.parts[2:4] == (
        Part(f"{prefix}.experts.5.gate_proj.weight", (32, 64), (0, 0), (16, 64), (1, 0, 0)),
        Part(f"{prefix}.experts.5.up_proj.weight", (32, 64), (0, 0), (16, 64), (1, 16, 0)),
    )
    assert w2.parts[3] == Part(f"{prefix}.experts.7.down_proj.weight", (64, 32), (0, 0), (64, 16), (3, 0, 0))
    assert held[f"{prefix}.gate.e_score_correction_bias"].dtype_kind == "fp32"
    assert held[f"{prefix}.gate.weight"].dtype_kind == "served"
    assert held[f"{prefix}.shared_experts.gate_up_proj.weight"].shape == (16, 64)


def test_the_shared_expert_is_fused_as_sglang_decides():
    prefix = "model.layers.1.mlp"
    held = params_of(fields_of("deepseek_v3"), "tp=2", 1, EngineBuild(fuse_shared_experts=True))
    w13 = held[f"{prefix}.experts.w13_weight"]
    assert w13.shape == (9, 32, 64)
    assert pieces(w13)[-2:] == [
        ("gate_proj.weight", (16, 0), (16, 64), (8, 0, 0)),
        ("up_proj.weight", (16, 0), (16, 64), (8, 16, 0)),
    ]
    assert f"{prefix}.shared_experts.gate_up_proj.weight" not in held
    large = fields_of("deepseek_v3", n_routed_experts=256, num_hidden_layers=2)
    name = f"{prefix}.experts.w2_weight"
    assert params_of(large, "tp=2", 0)[name].shape[0] == 257
    assert params_of(large, "tp=2,ep=2", 0)[name].shape[0] == 128
    assert params_of(large, "tp=2", 0, CPU)[name].shape[0] == 256
    assert params_of(large, "tp=2", 0, EngineBuild(fuse_shared_experts=False))[name].shape[0] == 256


@pytest.mark.parametrize(
    ("family", "layout", "build", "told"),
    [
        ("qwen2", "tp=3", None, "num_attention_heads = 4"),
        ("qwen2", "tp=2,attn_dp=2", None, "attention of qwen2"),
        ("deepseek_v3", "tp=64", None, "must divide moe_intermediate_size"),
        ("deepseek_v3", "tp=2,ep=2", EngineBuild(fuse_shared_experts=True), "ep=1"),
        ("qwen2", "1", EngineBuild(device="tpu"), "cuda or cpu"),
        ("llama", "ep=2,tp=2", None, "no experts"),
    ],
)
def test_what_sglang_would_not_build_is_refused(family: str, layout: str, build: EngineBuild | None, told: str):
    with pytest.raises(ValueError, match=told):
        params_of(fields_of(family), layout, 0, build)


def test_a_rank_that_is_not_there_is_refused_and_copies_are_alike():
    fields = fields_of("qwen2")
    with pytest.raises(ValueError, match="below 4"):
        params_of(fields, "tp=2,dp=2", 4)
    assert params_of(fields, "tp=2,dp=2", 3) == params_of(fields, "tp=2,dp=2", 1)


@st.composite
def models(draw) -> tuple[HfFields, EngineLayout, EngineBuild]:
    """A model and an engine that SGLang would build of it."""
    family = draw(st.sampled_from(["qwen2", "llama", "deepseek_v3"]))
    device = draw(st.sampled_from(["cuda", "cpu"]))
    tp = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = max(kv_heads, tp) * draw(st.integers(1, 2))
    over = {
        "num_hidden_layers": 2, "vocab_size": draw(st.integers(1, 300)), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "hidden_size": heads * 4, "intermediate_size": 4 * draw(st.integers(1, 12)),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    ep, attn_dp, build = 1, 1, EngineBuild(device=device)
    if family == "deepseek_v3":
        over["num_key_value_heads"] = heads
        over |= {
            "q_lora_rank": draw(st.sampled_from([None, 12])), "n_shared_experts": draw(st.integers(0, 2)),
            "moe_intermediate_size": 4 * draw(st.integers(1, 10)),
        }  # fmt: skip
        ep, attn_dp = (draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0])) for _ in range(2))
        flags = [draw(st.booleans()) for _ in range(3)]
        build = EngineBuild(device, None, *flags)
        if over["n_shared_experts"] == 1 and ep == 1 and not build.whole_shared_experts:
            build = EngineBuild(device, draw(st.booleans()), *flags)
    return fields_of(family, **over), EngineLayout(tp=tp, ep=ep, attn_dp=attn_dp), build


def copies_of(name: str, fields: HfFields, layout: EngineLayout, build: EngineBuild) -> int:
    """How many ranks of the engine hold each element of a tensor."""
    tp, attn_dp = layout.tp, layout.attn_dp
    kind = ".".join(name.split(".")[-2:])
    if "norm" in name or ".gate." in name or kind in ("q_a_proj.weight", "kv_a_proj_with_mqa.weight"):
        return tp
    if ".experts." in name:
        return 1
    if ".shared_experts." in name:
        return tp if build.whole_shared_experts else 1
    if ".mlp." in name:
        return tp if build.whole_dense_mlps else 1
    if kind.startswith(("k_proj", "v_proj")):
        return max(tp // fields["num_key_value_heads"], 1) if build.device == "cuda" else 1
    if name == "lm_head.weight":
        return attn_dp if build.dp_lm_head else 1
    return attn_dp


@settings(max_examples=60, deadline=None)
@given(models())
def test_every_element_is_held_as_often_as_it_must_be(model: tuple[HfFields, EngineLayout, EngineBuild]):
    fields, layout, build = model
    tensors = {tensor.name: tensor.shape for slot in slots_of(fields) for tensor in slot.tensors}
    if fields.is_moe and not fields["n_shared_experts"]:
        tensors = {name: shape for name, shape in tensors.items() if "shared_experts" not in name}
    held = {name: np.zeros(shape, dtype=int) for name, shape in tensors.items()}
    for rank in range(layout.num_ranks):
        for param in engine_params(fields, layout, rank, build):
            for part in param.parts:
                assert part.whole == tensors[part.tensor]
                held[part.tensor][tuple(slice(a, a + n) for a, n in zip(part.offset, part.shape, strict=True))] += 1
    for name, counts in held.items():
        assert (counts == copies_of(name, fields, layout, build)).all(), name


@settings(max_examples=60, deadline=None)
@given(models())
def test_parts_lie_in_order_and_not_over_each_other(model: tuple[HfFields, EngineLayout, EngineBuild]):
    fields, layout, build = model
    for rank in range(layout.num_ranks):
        params = engine_params(fields, layout, rank, build)
        assert max(Counter(param.name for param in params).values()) == 1
        for param in params:
            taken = np.zeros(param.shape, dtype=int)
            for part in param.parts:
                shape = (1,) * (len(param.shape) - len(part.shape)) + part.shape
                assert all(at + size <= whole for at, size, whole in zip(part.at, shape, param.shape, strict=True))
                assert len(part.shape) == 1 or part.at[-1] == 0
                taken[tuple(slice(at, at + size) for at, size in zip(part.at, shape, strict=True))] += 1
            assert taken.max(initial=0) <= 1
            assert [part.at for part in param.parts] == sorted(part.at for part in param.parts)
            padded = build.device == "cpu" or param.name in ("model.embed_tokens.weight", "lm_head.weight")
            assert padded or taken.all(), param.name
