"""Parameters and model FLOPs of a decoder from its shape.

One multiply-add counts as two FLOPs. Counted are the matrix products of the forward pass: the projections, the
feed-forward layers, the router, the output head, and attention's scores and weighted sum. Norms, rotary embeddings,
softmax and the embedding lookup are left out, as is usual for model FLOPs utilisation; recomputed activations are not
counted either. The backward pass costs two forward passes (Kaplan et al. 2020, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BACKWARD_FACTOR = 2  # one product for the gradient of the input, one for that of the weight


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Multi-head or grouped-query attention (Qwen2, Llama). `head_dim` is per head; `qkv_bias` adds q, k, v biases."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False

    def matmul_params(self, hidden: int) -> int:
        """Weights of the q, k, v and output projections."""
        return hidden * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    def other_params(self) -> int:
        """Biases."""
        return self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0

    def flops_per_context_token(self) -> int:
        """FLOPs of one query against one key: the score and the weighted sum of values."""
        return 2 * self.num_heads * 2 * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1) in its training form, keys and values expanded.

    `q_lora_rank` None: the query is projected directly.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    def matmul_params(self, hidden: int) -> int:
        """Weights of the down, up and output projections."""
        query_width = self.num_heads * (self.nope_dim + self.rope_dim)
        rank = self.q_lora_rank
        query = hidden * query_width if rank is None else rank * (hidden + query_width)
        down = hidden * (self.kv_lora_rank + self.rope_dim)
        up = self.kv_lora_rank * self.num_heads * (self.nope_dim + self.value_dim)
        return query + down + up + self.num_heads * self.value_dim * hidden

    def other_params(self) -> int:
        """The norms of the latents."""
        return (self.q_lora_rank or 0) + self.kv_lora_rank

    def flops_per_context_token(self) -> int:
        """FLOPs of one query against one key: the score and the weighted sum of values."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)


@dataclass(frozen=True)
class Experts:
    """Gated experts from layer `first_dense` on: `top_k` of `num_experts` plus `num_shared`, each of width `ffn`."""

    num_experts: int
    top_k: int
    ffn: int
    num_shared: int = 0
    first_dense: int = 0
    gate_bias: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A decoder of `num_layers` layers; `ffn` is the width of the gated (three-matrix) dense feed-forward."""

    hidden: int
    num_layers: int
    vocab: int
    ffn: int
    attention: GroupedQueryAttention | LatentAttention
    experts: Experts | None = None
    tied_embedding: bool = False

    @property
    def num_expert_layers(self) -> int:
        """Layers whose feed-forward is a mixture of experts."""
        return 0 if self.experts is None else self.num_layers - self.experts.first_dense


def _matmul_params(shape: ModelShape, experts_counted: int) -> int:
    """Weights used in matrix products with `experts_counted` routed experts per expert layer."""
    gated = 3 * shape.hidden
    dense = (shape.num_layers - shape.num_expert_layers) * gated * shape.ffn
    sparse = 0
    if shape.experts is not None:
        moe = shape.experts
        per_layer = shape.hidden * moe.num_experts + gated * moe.ffn * (experts_counted + moe.num_shared)
        sparse = shape.num_expert_layers * per_layer
    attention = shape.num_layers * shape.attention.matmul_params(shape.hidden)
    return attention + dense + sparse + shape.vocab * shape.hidden


def _parameters(shape: ModelShape, experts_counted: int) -> int:
    norms = (2 * shape.num_layers + 1) * shape.hidden
    inner = shape.num_layers * shape.attention.other_params()
    bias = 0
    if shape.experts is not None and shape.experts.gate_bias:
        bias = shape.num_expert_layers * shape.experts.num_experts
    embedding = 0 if shape.tied_embedding else shape.vocab * shape.hidden
    return _matmul_params(shape, experts_counted) + norms + inner + bias + embedding


def total_parameters(shape: ModelShape) -> int:
    """All parameters; a tied embedding counts once. DeepSeek-V3: 671,026,419,200 (without the MTP module)."""
    return _parameters(shape, shape.experts.num_experts if shape.experts else 0)


def active_parameters(shape: ModelShape) -> int:
    """Parameters one token passes, the input embedding included. DeepSeek-V3: 37,552,297,472."""
    return _parameters(shape, shape.experts.top_k if shape.experts else 0)


def forward_flops_per_token(shape: ModelShape, context: float) -> float:
    """FLOPs of inference per token that attends to `context` tokens, itself included (see `mean_context`)."""
    matmul = 2 * _matmul_params(shape, shape.experts.top_k if shape.experts else 0)
    return matmul + shape.num_layers * shape.attention.flops_per_context_token() * context


def training_flops_per_token(shape: ModelShape, context: float) -> float:
    """FLOPs of a forward and a backward pass per token; about 6 x active parameters where the context is short."""
    return (1 + BACKWARD_FACTOR) * forward_flops_per_token(shape, context)


def mean_context(lengths: Iterable[int]) -> float:
    """Mean number of tokens a token attends to under a causal mask, over sequences of these lengths.

    Token i of a sequence (from 1) sees i tokens, so a sequence of length n holds n(n+1)/2 pairs. Packing does not
    change it. Raises ValueError where there is no token.
    """
    counts = list(lengths)
    tokens = sum(counts)
    if tokens == 0:
        raise ValueError("mean_context needs at least one token")
    return sum(n * (n + 1) // 2 for n in counts) / tokens


def utilization(tokens_per_second: float, flops_per_token: float, num_devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation in 0..1: achieved over peak FLOP/s of `num_devices` devices (PaLM, appendix B)."""
    return tokens_per_second * flops_per_token / (num_devices * peak_flops)
