from __future__ import annotations

import dataclasses

import pytest

from r1mega.metrics.flops import (
    Experts,
    GroupedQueryAttention,
    LatentAttention,
    ModelShape,
    active_parameters,
    forward_flops_per_token,
    mean_context,
    total_parameters,
    training_flops_per_token,
    utilization,
)

DEEPSEEK_V3 = ModelShape(
    hidden=7168,
    num_layers=61,
    vocab=129280,
    ffn=18432,
    attention=LatentAttention(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
    experts=Experts(num_experts=256, top_k=8, ffn=2048, num_shared=1, first_dense=3, gate_bias=True),
)
TINY_DENSE = ModelShape(
    hidden=4,
    num_layers=2,
    vocab=10,
    ffn=6,
    attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=3, qkv_bias=True),
)


def test_dense_by_hand() -> None:
    # One layer: q 4x6 = 24, k and v 4x3 = 12 each, output 6x4 = 24, feed-forward 3 x 4x6 = 72: 144. Head 10x4 = 40.
    matmul = 2 * 144 + 40
    # Attention: 2 heads x 3 wide x (score + weighted sum) x 2 FLOPs = 24 per key and layer.
    assert forward_flops_per_token(TINY_DENSE, context=5) == 2 * matmul + 2 * 24 * 5
    assert training_flops_per_token(TINY_DENSE, context=5) == 3 * (2 * matmul + 240)
    # Besides: embedding 40, five norms of 4, biases of 2 layers x (6 + 3 + 3).
    assert total_parameters(TINY_DENSE) == active_parameters(TINY_DENSE) == matmul + 40 + 20 + 24
    assert total_parameters(dataclasses.replace(TINY_DENSE, tied_embedding=True)) == matmul + 20 + 24


def test_experts_and_latent_attention_by_hand() -> None:
    shape = ModelShape(
        hidden=4,
        num_layers=2,
        vocab=10,
        ffn=6,
        attention=LatentAttention(num_heads=2, q_lora_rank=None, kv_lora_rank=3, nope_dim=2, rope_dim=1, value_dim=5),
        experts=Experts(num_experts=4, top_k=2, ffn=3, num_shared=1, first_dense=1, gate_bias=True),
    )
    # Attention: q 4x6 = 24, down 4x(3+1) = 16, up 3 x 2x(2+5) = 42, output 10x4 = 40: 122 a layer, latent norm 3.
    # Dense layer 3x4x6 = 72. Expert layer: router 16, one expert 3x4x3 = 36.
    active_matmul = 2 * 122 + 72 + (16 + 36 * (2 + 1)) + 40
    rest = 40 + 5 * 4 + 2 * 3 + 4
    assert active_parameters(shape) == active_matmul + rest
    assert total_parameters(shape) == active_matmul + 2 * 36 + rest
    assert forward_flops_per_token(shape, context=7) == 2 * active_matmul + 2 * (2 * 2 * (3 + 5)) * 7
    with_rank = dataclasses.replace(shape, attention=dataclasses.replace(shape.attention, q_lora_rank=2))
    # q becomes 2x4 + 2x6 = 20 with a norm of 2: two layers, each 24 - 20 - 2 fewer.
    assert total_parameters(with_rank) == total_parameters(shape) - 2 * 2


def test_deepseek_v3_has_its_published_size() -> None:
    # The elements of the released checkpoint without its MTP module (huggingface.co/deepseek-ai/DeepSeek-V3).
    assert total_parameters(DEEPSEEK_V3) == 671_026_419_200
    assert active_parameters(DEEPSEEK_V3) == 37_552_297_472


def test_deepseek_v3_costs_six_flops_per_active_parameter_and_attention() -> None:
    short = training_flops_per_token(DEEPSEEK_V3, context=1)
    # The input embedding is among the active parameters but is looked up, not multiplied: 36.63 B remain.
    assert short == pytest.approx(6 * (37_552_297_472 - 129280 * 7168), rel=2e-4)
    assert short == pytest.approx(6 * 37.55e9, rel=0.03)
    # With causal attention over 4,096 tokens: 219.7 + 3 x 61 x 2 x 128 x 320 x 2048.5 = 30.7 GFLOPs more.
    long = training_flops_per_token(DEEPSEEK_V3, mean_context([4096]))
    assert long == pytest.approx(250.5e9, rel=1e-3)
    # Negative control: counting all 256 experts is off by a factor, far outside the tolerance.
    assert 6 * total_parameters(DEEPSEEK_V3) > 10 * short


def test_mean_context() -> None:
    assert mean_context([4]) == 2.5  # 1, 2, 3, 4
    assert mean_context([1, 3]) == (1 + 1 + 2 + 3) / 4
    assert mean_context([0, 2]) == 1.5
    with pytest.raises(ValueError, match="at least one token"):
        mean_context([0])


def test_utilization() -> None:
    assert utilization(tokens_per_second=1000, flops_per_token=2e9, num_devices=4, peak_flops=1e12) == 0.5
