"""Core attention over packed sequences on torch's scaled_dot_product_attention, for CPU and for CUDA without TE.

Megatron's own local attention takes neither packed sequences nor MLA's unequal query and value widths. Sequences lie
end to end ("thd"); here they are lifted into a few padded batches of similar length, attended causally, and laid back.
Padding stands at the end of a row, where a causal mask already hides it from every real token, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# A row is put beside longer ones only while it fills at least this share of them: above it the wasted work costs more
# than one more call.
_MIN_FILL = 0.7


@dataclass(frozen=True)
class _Bucket:
    """Rows padded to one length. `gather` [rows * length] picks the tokens; None: the tokens lie there already."""

    rows: int
    length: int
    gather: torch.Tensor | None


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's PackedSeqParams, with the lift into padded batches worked out once per micro-batch."""

    buckets: list[_Bucket] = field(default_factory=list)
    restore: torch.Tensor | None = None  # [T] where in the concatenated padded rows each token ended up; None: in place

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """The parameters of sequences of these lengths lying end to end in this order."""
        lengths = [int(length) for length in lengths]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        longest = max(lengths)
        packed = PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        if len(set(lengths)) == 1:
            packed.buckets = [_Bucket(len(lengths), longest, None)]
            return packed
        packed._plan(lengths, starts, device)
        return packed

    def _plan(self, lengths: list[int], starts: list[int], device: torch.device) -> None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        restore = torch.empty(starts[-1], dtype=torch.int64)
        offset = first = 0
        while first < len(order):
            length = lengths[order[first]]
            last = first
            while last < len(order) and lengths[order[last]] >= _MIN_FILL * length:
                last += 1
            rows = order[first:last]
            gather = torch.tensor([starts[i] for i in rows])[:, None] + torch.arange(length)
            for row, i in enumerate(rows):
                at = offset + row * length
                restore[starts[i] : starts[i + 1]] = torch.arange(at, at + lengths[i])
            # Padding reads the token after the row's end, whatever it is: causality hides it.
            gather = gather.clamp_(max=starts[-1] - 1).flatten()
            self.buckets.append(_Bucket(len(rows), length, gather.to(device)))
            offset += len(rows) * length
            first = last
        self.restore = restore.to(device)


class TorchCoreAttention(MegatronModule):
    """Causal attention of one rank's heads over PackedSequences; grouped keys and values are shared, not copied."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """query [T, heads, q_dim], key [T, kv_heads, q_dim], value [T, kv_heads, v_dim] -> [T, heads * v_dim]."""
        assert isinstance(packed_seq_params, PackedSequences) and attention_bias is None
        outputs = []
        for bucket in packed_seq_params.buckets:
            parts = (query, key, value)
            if bucket.gather is not None:
                parts = tuple(part.index_select(0, bucket.gather) for part in parts)
            q, k, v = (part.unflatten(0, (bucket.rows, bucket.length)).transpose(1, 2) for part in parts)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).reshape(bucket.rows * bucket.length, -1))
        if packed_seq_params.restore is None:
            return outputs[0]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return whole.index_select(0, packed_seq_params.restore)
