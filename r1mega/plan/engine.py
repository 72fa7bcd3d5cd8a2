"""Memory and speed of one SGLang server: weights, cache, and how many sequences it decodes at once.

Weights follow `weights.engine_params`: attention is cut over tp / attn_dp ranks and repeated attn_dp times, experts and
feed-forward over all tp ranks. The cache of latent attention (MLA) holds one latent and one rotary key a token and
layer, whole on every rank that serves the sequence (DeepSeek-V2, section 2.1.2); that of grouped-query attention keys
and values of the rank's heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.models.hf_fields import HfFields

_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0 + 4 / (128 * 128)}


@dataclass(frozen=True)
class Engine:
    """One server: its ranks and what they hold.

    `dtype` is that of the weights; `cache_bytes` of an element of the cache.
    """

    fields: HfFields
    tp: int
    attn_dp: int
    dtype: str
    cache_bytes: float
    redundant_experts: int = 0
    drafts: bool = False

    @property
    def attention_tp(self) -> int:
        """Ranks that share the heads of a sequence."""
        return self.tp // self.attn_dp

    def weights(self) -> float:
        """Bytes of one rank's weights."""
        fields = self.fields
        linear, other = _BYTES[self.dtype], 4.0 if self.dtype == "fp32" else 2.0
        layers = fields["num_hidden_layers"]
        cut, whole = self._attention()
        hidden = fields["hidden_size"]
        elements = layers * (cut / self.attention_tp + whole)
        moe = len(fields.moe_layers)
        elements += (layers - moe) * 3 * hidden * fields["intermediate_size"] / self.tp
        if moe:
            extra = moe + (1 if self.drafts else 0)
            wide = 3 * hidden * fields["moe_intermediate_size"]
            experts = (fields["n_routed_experts"] + self.redundant_experts) / self.tp
            elements += extra * wide * (experts + fields["n_shared_experts"] / self.tp)
            elements += self.drafts * (2 * hidden * hidden + cut / self.attention_tp + whole)
        tables = (1 if fields["tie_word_embeddings"] else 2) * fields["vocab_size"] * hidden / self.attention_tp
        gates = moe * hidden * fields["n_routed_experts"] if moe else 0
        return linear * elements + other * (tables + gates + (2 * layers + 1) * hidden)

    def _attention(self) -> tuple[int, int]:
        """Weights of a layer's attention that are cut over heads, and those every rank holds."""
        fields = self.fields
        hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
        if not fields.is_moe:
            return hidden * fields.head_dim * (2 * heads + 2 * fields["num_key_value_heads"]), 0
        nope, rope, value = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"], fields["v_head_dim"]
        rank, latent = fields["q_lora_rank"], fields["kv_lora_rank"]
        down = hidden * (latent + rope) + (0 if rank is None else hidden * rank)
        query = heads * (nope + rope) * (hidden if rank is None else rank)
        return query + heads * (nope + value) * latent + heads * value * hidden, down

    def cache_per_token(self) -> float:
        """Bytes of one rank's cache for one token of a sequence that it serves."""
        fields = self.fields
        layers = fields["num_hidden_layers"] + (1 if self.drafts else 0)
        if fields.is_moe:
            return layers * (fields["kv_lora_rank"] + fields["qk_rope_head_dim"]) * self.cache_bytes
        heads = max(1, fields["num_key_value_heads"] / self.attention_tp)  # repeated where there are more ranks
        return layers * 2 * heads * fields.head_dim * self.cache_bytes

    def active_weights(self, batch: float) -> float:
        """Bytes of one rank's weights that a step of `batch` sequences reads: of the experts those that are chosen."""
        fields, held = self.fields, self.weights()
        moe = len(fields.moe_layers)
        if not moe:
            return held
        wide = 3 * fields["hidden_size"] * fields["moe_intermediate_size"] * _BYTES[self.dtype]
        experts = moe * wide * fields["n_routed_experts"] / self.tp
        idle = (1 - fields["num_experts_per_tok"] / fields["n_routed_experts"]) ** batch
        return held - experts * idle
