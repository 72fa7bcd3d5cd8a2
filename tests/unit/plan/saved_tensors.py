"""Asks autograd what the layers of small models save for the backward pass: every storage once, parameters left out.

Prints one JSON line a case with the bytes and with what an estimate needs. `python saved_tensors.py`.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import torch

from r1mega.models.hf_fields import parse
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 250, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {**QWEN2, "model_type": "llama", "head_dim": 24, "num_key_value_heads": 6}
DEEPSEEK = {
    **QWEN2, "model_type": "deepseek_v3", "num_key_value_heads": 6, "q_lora_rank": 40, "kv_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 48,
    "n_routed_experts": 16, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
EVEN, ODD = [48, 48, 48], [60, 50, 20, 14]
FULL, CORE = {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("core_attn",)}
CASES: list[tuple[str, dict[str, Any], list[int], str, dict[str, Any]]] = [
    ("qwen2 none", QWEN2, EVEN, "bf16", {}),
    ("qwen2 none odd", QWEN2, ODD, "bf16", {}),
    ("qwen2 fp32 odd", QWEN2, ODD, "fp32", {}),
    ("qwen2 core_attn", QWEN2, EVEN, "bf16", CORE),
    ("qwen2 core_attn odd", QWEN2, ODD, "bf16", CORE),
    ("qwen2 mlp", QWEN2, EVEN, "bf16", {"recompute": "selective", "recompute_modules": ("mlp",)}),
    ("qwen2 full", QWEN2, ODD, "bf16", FULL),
    ("qwen2 emulated fp8", QWEN2, [70, 58], "bf16", {"fp8": True, "emulate_fp8": True}),  # 128 tokens, which it pads to
    ("llama none", LLAMA, EVEN, "fp32", {}),
    ("llama full of two", LLAMA, EVEN, "bf16", {**FULL, "recompute_num_layers": 2}),
    ("deepseek none", DEEPSEEK, EVEN, "bf16", {}),
    ("deepseek none odd", DEEPSEEK, ODD, "bf16", {}),
    ("deepseek fp32", DEEPSEEK, EVEN, "fp32", {}),
    ("deepseek core_attn", DEEPSEEK, EVEN, "bf16", CORE),
    (
        "deepseek moe and shared", DEEPSEEK, EVEN, "bf16",
        {"recompute": "selective", "recompute_modules": ("moe", "shared_experts")},
    ),
    ("deepseek shared", DEEPSEEK, EVEN, "bf16", {"recompute": "selective", "recompute_modules": ("shared_experts",)}),
    ("deepseek full", DEEPSEEK, EVEN, "bf16", FULL),
]  # fmt: skip


class Weights:
    """A source of random weights."""

    def holds(self, _name: str) -> bool:
        return False

    def get(self, tensor: Any) -> torch.Tensor:
        return torch.ones(tensor.shape) if tensor.kind == "norm" else torch.randn(tensor.shape) * 0.02


def saved_bytes(model: dict[str, Any], lengths: list[int], params: str, options: dict[str, Any], world: Any) -> int:
    """Bytes that one micro-batch's forward pass leaves for its backward pass."""
    from r1mega.models.hf_config import ModelOptions
    from r1mega.train.batch import PackItem
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[params]
    policy = MegatronPolicy(parse(model), world, ModelOptions(params_dtype=dtype, **options), AdamSettings(lr=1e-5))
    policy.load(Weights())
    draw = random.Random(0)
    items = [PackItem([draw.randrange(250) for _ in range(length)], length - length // 4) for length in lengths]
    own = [*policy.chunks[0].parameters(), *policy.chunks[0].buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    found: dict[int, torch.UntypedStorage] = {}
    is_over = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not is_over and storage.nbytes() and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    def loss(logprobs_R: torch.Tensor, _entropy_R: torch.Tensor, _micro: Any):
        nonlocal is_over
        is_over = True  # the backward pass saves what it computes again
        return logprobs_R.sum(), {}

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.forward_backward(items, policy.plan(items, sum(lengths)), loss)
    policy.close()
    return sum(storage.nbytes() for storage in found.values())


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    world = groups.initialize(Layout(), "cpu", seed=0, timeout_minutes=1)
    for name, model, lengths, params, options in CASES:
        nbytes = saved_bytes(model, lengths, params, options, world)
        line = {"name": name, "model": model, "lengths": lengths, "params": params, "options": options, "bytes": nbytes}
        print(json.dumps(line), flush=True)
    groups.shutdown()


def _free_port() -> int:
    import socket

    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


if __name__ == "__main__":
    main()
