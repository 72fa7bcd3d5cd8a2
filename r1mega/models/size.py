"""How many parameters a model has, from its config.json. No torch."""

from __future__ import annotations

from dataclasses import replace

from r1mega.metrics.flops import (
    Experts,
    GroupedQueryAttention,
    LatentAttention,
    ModelShape,
    total_parameters,
)
from r1mega.models.hf_fields import HfFields


def model_shape(fields: HfFields) -> ModelShape:
    """The decoder of a config.json, without a multi-token-prediction layer; FLOPs are reckoned from it too."""
    experts = None
    if fields.is_moe:
        attention: GroupedQueryAttention | LatentAttention = LatentAttention(
            num_heads=fields["num_attention_heads"],
            q_lora_rank=fields["q_lora_rank"],
            kv_lora_rank=fields["kv_lora_rank"],
            nope_dim=fields["qk_nope_head_dim"],
            rope_dim=fields["qk_rope_head_dim"],
            value_dim=fields["v_head_dim"],
        )
        experts = Experts(
            num_experts=fields["n_routed_experts"],
            top_k=fields["num_experts_per_tok"],
            ffn=fields["moe_intermediate_size"],
            num_shared=fields["n_shared_experts"],
            first_dense=fields["first_k_dense_replace"],
            gate_bias=True,
        )
    else:
        attention = GroupedQueryAttention(
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields.head_dim,
            qkv_bias=fields.family == "qwen2",
        )
    return ModelShape(
        hidden=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        vocab=fields["vocab_size"],
        ffn=fields["intermediate_size"],
        attention=attention,
        experts=experts,
        tied_embedding=fields["tie_word_embeddings"] and not fields.has_score,
    )


def num_parameters(fields: HfFields) -> int:
    """All parameters, gate biases and a multi-token-prediction layer included; its embedding and head are shared.

    DeepSeek-V3: 671,026,419,200, and 11,610,068,224 of that layer.
    """
    shape = model_shape(fields)
    total = total_parameters(shape)
    if fields.num_mtp_layers:
        # One more layer of experts, the projection of two hidden states to one, and the three norms around them.
        layer = total_parameters(replace(shape, num_layers=shape.num_layers + 1)) - total
        total += layer + 2 * shape.hidden**2 + 3 * shape.hidden
    return total
