"""Tiny checkpoints of the three families with random weights, as transformers itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_DENSE = {
    "vocab_size": 323, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.08,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DENSE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0, "rope_parameters": YARN,
    },
    "qwen2": {**_DENSE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama": {**_DENSE, "rope_parameters": LLAMA3},
}  # fmt: skip
# Changes of these that FP8 products divide, on two ranks too; those of the experts stay whole blocks of 128.
FP8_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.05},
    "deepseek_v3": {
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 128,
        "kv_lora_rank": 112, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 64, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2, "initializer_range": 0.05,
        "mtp": True,
    },
}  # fmt: skip


def write_checkpoint(
    path: Path, family: str, *, dtype: str = "float32", seed: int = 0, mtp: bool = False, **overrides: Any
) -> Path:
    """Write a checkpoint of random weights, norms, biases and gate biases; with `mtp` also the layer after the last."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from parity.mtp_reference import add_mtp_tensors

    config = AutoConfig.for_model(family, **{**SHAPES[family], **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_((0.02 if name.endswith("bias") else config.initializer_range) * noise)
    model.save_pretrained(path)
    if mtp:
        add_mtp_tensors(path, seed)
    return path
