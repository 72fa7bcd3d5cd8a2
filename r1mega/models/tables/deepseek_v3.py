"""DeepSeek-V3 and R1: multi-head latent attention, dense first layers, then routed and shared experts.

Names and shapes as published in the checkpoint of DeepSeek-V3-Base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Cut, HfTensor, Slot, Whole
from r1mega.models.tables import common


def slots(fields: HfFields) -> Iterator[Slot]:
    """Every parameter and the gate biases, in the order of the checkpoint."""
    mtp = f"model.layers.{fields['num_hidden_layers']}" if fields.num_mtp_layers else None
    tables = [f"{mtp}.embed_tokens.weight", f"{mtp}.shared_head.head.weight"] if mtp else []
    # Tied, both repeat the embedding: the output table is a copy of it.
    yield common.embedding(fields, *(tables if fields["tie_word_embeddings"] else tables[:1]))
    for layer in range(fields["num_hidden_layers"]):
        yield from _attention(fields, layer)
        if layer < fields["first_k_dense_replace"]:
            yield from common.gated_mlp("mlp", "mlp", fields["hidden_size"], fields["intermediate_size"], layer)
        else:
            yield from _experts(fields, layer)
    yield from common.head(fields, alias=tables[1] if mtp and not fields["tie_word_embeddings"] else None)
    if mtp:
        yield from _multi_token_prediction(fields, mtp)


def _multi_token_prediction(fields: HfFields, prefix: str) -> Iterator[Slot]:
    """The layer after the last (V3 section 2.2): two norms, a projection of both, a layer of experts, a norm.

    It stands on the last stage, which for it holds the embedding too.
    """
    hidden, layer, ours = fields["hidden_size"], fields["num_hidden_layers"], "mtp.layers.0"
    yield replace(common.embedding(fields), place="last", is_copy=True)
    for megatron, hf in (("enorm", "enorm"), ("hnorm", "hnorm")):
        norm = HfTensor(f"{prefix}.{hf}.weight", (hidden,), "norm")
        yield Slot(f"{ours}.{megatron}.weight", (norm,), Whole(), axis=None, place="last")
    joined = HfTensor(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden))
    yield Slot(f"{ours}.eh_proj.weight", (joined,), Cut(0), place="last")
    for slot in (*_attention(fields, layer), *_experts(fields, layer)):
        name = slot.name.replace(f"decoder.layers.{layer}.", f"{ours}.transformer_layer.", 1)
        yield replace(slot, name=name, layer=None, place="last")
    norm = HfTensor(f"{prefix}.shared_head.norm.weight", (hidden,), "norm")
    yield Slot(f"{ours}.final_layernorm.weight", (norm,), Whole(), axis=None, place="last")


def _attention(fields: HfFields, layer: int) -> Iterator[Slot]:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    nope, rope, value = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"], fields["v_head_dim"]
    q_rank, kv_rank = fields["q_lora_rank"], fields["kv_lora_rank"]
    ours, theirs = "self_attention", "self_attn"
    query_rows = heads * (nope + rope)
    yield common.norm("input_layernorm", "input_layernorm", hidden, layer)
    if q_rank is None:
        yield common.linear(f"{ours}.linear_q_proj", f"{theirs}.q_proj", (query_rows, hidden), layer, 0)
    else:
        yield common.linear(f"{ours}.linear_q_down_proj", f"{theirs}.q_a_proj", (q_rank, hidden), layer, None)
        yield common.norm(f"{ours}.q_layernorm", f"{theirs}.q_a_layernorm", q_rank, layer)
        yield common.linear(f"{ours}.linear_q_up_proj", f"{theirs}.q_b_proj", (query_rows, q_rank), layer, 0)
    down = (kv_rank + rope, hidden)
    yield common.linear(f"{ours}.linear_kv_down_proj", f"{theirs}.kv_a_proj_with_mqa", down, layer, None)
    yield common.norm(f"{ours}.kv_layernorm", f"{theirs}.kv_a_layernorm", kv_rank, layer)
    up = (heads * (nope + value), kv_rank)
    yield common.linear(f"{ours}.linear_kv_up_proj", f"{theirs}.kv_b_proj", up, layer, 0)
    yield common.linear(f"{ours}.linear_proj", f"{theirs}.o_proj", (hidden, heads * value), layer, 1)
    yield common.norm("pre_mlp_layernorm", "post_attention_layernorm", hidden, layer)


def _experts(fields: HfFields, layer: int) -> Iterator[Slot]:
    hidden, ffn, experts = fields["hidden_size"], fields["moe_intermediate_size"], fields["n_routed_experts"]
    yield common.linear("mlp.router", "mlp.gate", (experts, hidden), layer, None, fp8=False)
    bias = HfTensor(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (experts,), "zero")
    yield Slot(f"decoder.layers.{layer}.mlp.router.expert_bias", (bias,), Whole(), axis=None, layer=layer, fp32=True)
    for expert in range(experts):
        yield from common.gated_mlp(
            f"mlp.experts.local_experts.{expert}",
            f"mlp.experts.{expert}",
            hidden,
            ffn,
            layer,
            axis="etp",
            expert=expert,
        )
    shared = ffn * fields["n_shared_experts"]
    yield from common.gated_mlp("mlp.shared_experts", "mlp.shared_experts", hidden, shared, layer)
