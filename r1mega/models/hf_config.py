"""A validated Hugging Face config.json -> Megatron's TransformerConfig. `parallel.device.prepare` must have run.

What a configuration of a run adds to the model (layout, dtype, router training) comes in as plain values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout


@dataclass(frozen=True)
class ModelOptions:
    """What a run chooses about a model beyond its config.json."""

    params_dtype: torch.dtype = torch.float32
    layer_spec: str = "torch"  # or "te"
    router_bias_update_rate: float = 0.0
    router_balance_coef: float = 0.0
    freezes_mtp: bool = False
    fp8: bool = False  # matrix products of FP8 blocks: Transformer Engine's with layer_spec "te",
    emulate_fp8: bool = False  # or with this and "torch" emulated ones
    dispatcher: str = "alltoall"  # or "flex"
    fuse_weight_gradients: bool = False
    recompute: str = "none"  # or "selective", "full"
    recompute_modules: tuple[str, ...] = ()
    recompute_num_layers: int = 1


def transformer_config(fields: HfFields, layout: Layout, options: ModelOptions) -> TransformerConfig:
    """The TransformerConfig of one rank of `layout`.

    Gradients are summed, never averaged, over micro-batches and data parallel ranks (`calculate_per_token_loss`): the
    loss arrives already divided by the global count.
    """
    common = _common(fields, layout, options)
    if fields.family == "deepseek_v3":
        config = MLATransformerConfig(**common, **_mla(fields), **_moe(fields, options))
        # As in FP8 of Transformer Engine, which the constructor wants with it: the blocks of an expert's tokens are
        # then the same. The tokens that join have weight 0.
        config.moe_router_padding_for_quantization = options.fp8
        return config
    return TransformerConfig(
        **common,
        num_query_groups=fields["num_key_value_heads"],
        kv_channels=fields.head_dim,
        add_qkv_bias=fields.family == "qwen2",
    )


def padded_vocab_size(fields: HfFields, layout: Layout) -> int:
    """Rows of the embedding and output tables in Megatron: the vocabulary, rounded up to what tp divides."""
    return -(-fields["vocab_size"] // layout.tp) * layout.tp


def _common(fields: HfFields, layout: Layout, options: ModelOptions) -> dict[str, Any]:
    dtype = options.params_dtype
    on_te = options.layer_spec == "te"
    init = partial(torch.nn.init.normal_, mean=0.0, std=fields["initializer_range"])
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": fields["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "context_parallel_size": layout.cp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": _pipeline(fields, layout) if layout.pp > 1 else None,
        "mtp_num_layers": fields.num_mtp_layers or None,
        # Megatron's MoE needs it with tp > 1, and it shards norms and the residual stream of every family.
        "sequence_parallel": layout.tp > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "autocast_dtype": dtype,
        "enable_autocast": False,
        # Interleaved stages exchange tensors of one shape: with two stages Megatron mixes up the shapes it sends ahead
        # of tensors, because both neighbours are the same rank. For the same reason its transfers are not batched.
        "variable_seq_lengths": layout.vpp == 1,
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
        "calculate_per_token_loss": True,
        # Weights are always filled by the parameter table, from a checkpoint or from named random tensors.
        "perform_initialization": False,
        "use_cpu_initialization": False,
        "init_method": init,
        "output_layer_init_method": init,
        "gradient_accumulation_fusion": options.fuse_weight_gradients,
        "bias_activation_fusion": on_te,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": on_te,
        "apply_rope_fusion": False,
        "cross_entropy_loss_fusion": False,
        # Checked for dense models too: the only dispatcher that takes micro-batches of varying length.
        "moe_token_dispatcher_type": options.dispatcher,
        "moe_flex_dispatcher_backend": "deepep",
        **_recompute(options),
        **_fp8(options),
    }


def _pipeline(fields: HfFields, layout: Layout) -> list[list[str]]:
    """What each chunk of the pipeline holds, in Megatron's words."""
    chunks = [["decoder"] * count for count in layout.chunk_layers(fields["num_hidden_layers"])]
    chunks[0].insert(0, "embedding")
    chunks[-1] += ["mtp"] * fields.num_mtp_layers + ["loss"]
    return chunks


def _fp8(options: ModelOptions) -> dict[str, Any]:
    """Transformer Engine's blockwise recipe; the router pads each expert's tokens to what FP8 products divide."""
    if not options.fp8 or options.emulate_fp8:
        return {}
    return {"fp8": "e4m3", "fp8_recipe": "blockwise", "moe_router_padding_for_quantization": True}


def _recompute(options: ModelOptions) -> dict[str, Any]:
    """Which activations are thrown away and computed again in the backward pass."""
    if options.recompute == "none":
        return {}
    if options.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(options.recompute_modules)}
    # Uniform: the layers of a chunk in groups of so many, of each of which only the input is kept.
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": options.recompute_num_layers,
    }


def _mla(fields: HfFields) -> dict[str, Any]:
    rope = fields.rope
    values: dict[str, Any] = {
        "q_lora_rank": fields["q_lora_rank"],
        "kv_lora_rank": fields["kv_lora_rank"],
        "qk_head_dim": fields["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": fields["qk_rope_head_dim"],
        "v_head_dim": fields["v_head_dim"],
        "qk_layernorm": True,
        "rotary_base": rope["rope_theta"],
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
    if rope["rope_type"] == "yarn":
        values |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope["beta_fast"],
            "beta_slow": rope["beta_slow"],
            "mscale": rope["mscale"],
            "mscale_all_dim": rope["mscale_all_dim"],
        }
    return values


def _moe(fields: HfFields, options: ModelOptions) -> dict[str, Any]:
    dense = fields["first_k_dense_replace"]
    groups = fields["n_group"]
    balance = options.router_balance_coef
    return {
        "num_moe_experts": fields["n_routed_experts"],
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": fields["moe_intermediate_size"] * fields["n_shared_experts"],
        "moe_layer_freq": [0] * dense + [1] * (fields["num_hidden_layers"] - dense),
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": fields["topk_group"] if groups > 1 else None,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": fields["routed_scaling_factor"],
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": options.router_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if balance > 0 else "none",
        "moe_aux_loss_coeff": balance,
        "moe_grouped_gemm": options.layer_spec == "te",
    }
