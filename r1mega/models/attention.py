"""Core attention over packed sequences on torch's scaled_dot_product_attention, for CPU and for CUDA without TE.

Megatron's own local attention takes neither packed sequences nor MLA's unequal query and value widths. Sequences lie
end to end ("thd"); here they are lifted into a few padded batches of similar length, attended causally, and laid back.
Padding stands at the end of a row, where a causal mask already hides it from every real token, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
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
    """Rows padded to one length. `gather` [rows * length] picks the tokens; None: the tokens lie there already.

    With context parallelism the queries of a row are this rank's slices of it: `gather_q` [rows * queries] picks them
    and `positions_q` [rows, queries] says where in the row they stand.
    """

    rows: int
    length: int
    gather: torch.Tensor | None
    gather_q: torch.Tensor | None = None
    positions_q: torch.Tensor | None = None


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's PackedSeqParams, with the lift into padded batches worked out once per micro-batch.

    With context parallelism of size cp each sequence is cut into 2 cp equal slices, of which rank r holds slices r and
    2 cp - 1 - r, so that all ranks have alike many keys to attend to (Transformer Engine's cut). `local` lists, for
    this rank's T / cp tokens, where they stand in the whole pack.
    """

    buckets: list[_Bucket] = field(default_factory=list)
    restore: torch.Tensor | None = None  # [T / cp] where in the concatenated padded rows each token ended up
    local: torch.Tensor | None = None  # [T / cp]; None: cp is 1
    gathered: torch.Tensor | None = None  # [T] where in the ranks' tokens end to end each token of the pack stands
    whole_group: dist.ProcessGroup | None = None  # the cp group keys and values are gathered over
    # What the router asks: the sequence of each of this rank's tokens (-1: padding), tokens of each, weight of one.
    owners: torch.Tensor | None = None  # [T / cp]
    num_tokens: torch.Tensor | None = None  # [S], padding left out
    balance_weight: float = 0.0
    # Decoder layer -> [T / cp, top_k] the experts its tokens go to; -1 where the router chooses. None: it always does.
    choices: Mapping[int, torch.Tensor] | None = None

    def shortened(self) -> PackedSequences:
        """The same pack for a router that shall not count the last token of each sequence.

        The multi-token-prediction layer has no next token to join to it, so its work there is void. That layer's router
        always chooses: no engine tells of it.
        """
        owners = self.owners
        if self.gathered is not None:
            ranks = [torch.empty_like(owners) for _ in range(self.whole_group.size())]
            dist.all_gather(ranks, owners, group=self.whole_group)
            owners = torch.cat(ranks)[self.gathered]
        is_last = torch.cat([owners[1:] != owners[:-1], owners.new_ones(1, dtype=torch.bool)])
        owners = owners.masked_fill(is_last, -1)
        return replace(
            self,
            owners=owners if self.local is None else owners[self.local],
            num_tokens=self.num_tokens - 1,
            choices=None,
        )

    @staticmethod
    def of(
        lengths: Sequence[int],
        device: torch.device,
        *,
        cp: int = 1,
        cp_rank: int = 0,
        cp_group: dist.ProcessGroup | None = None,
    ) -> PackedSequences:
        """The parameters of sequences of these lengths lying end to end in this order.

        With cp > 1 every length must be a multiple of 2 cp.
        """
        lengths = [int(length) for length in lengths]
        assert cp == 1 or all(length % (2 * cp) == 0 for length in lengths)
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
        if cp > 1:
            packed.whole_group = cp_group
            by_rank = [context_slices(lengths, cp, rank) for rank in range(cp)]
            gathered = torch.empty(starts[-1], dtype=torch.int64)
            gathered[torch.tensor([at for tokens in by_rank for at in tokens])] = torch.arange(starts[-1])
            packed.gathered = gathered.to(device)
            packed.local = torch.tensor(by_rank[cp_rank], device=device)
        elif len(set(lengths)) == 1:
            packed.buckets = [_Bucket(len(lengths), longest, None)]
            return packed
        packed._plan(lengths, starts, device, cp, cp_rank)
        return packed

    def _plan(self, lengths: list[int], starts: list[int], device: torch.device, cp: int, cp_rank: int) -> None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        restore = torch.empty(starts[-1] // cp, dtype=torch.int64)
        offset = first = 0
        while first < len(order):
            length = lengths[order[first]]
            last = first
            while last < len(order) and lengths[order[last]] >= _MIN_FILL * length:
                last += 1
            rows = order[first:last]
            queries = length // cp
            for row, i in enumerate(rows):
                at = offset + row * queries
                restore[starts[i] // cp : starts[i + 1] // cp] = torch.arange(at, at + lengths[i] // cp)
            # Padding reads the token after the row's end, whatever it is: causality hides it.
            gather = (torch.tensor([starts[i] for i in rows])[:, None] + torch.arange(length)).flatten()
            gather = gather.clamp_(max=starts[-1] - 1).to(device)
            if cp == 1:
                self.buckets.append(_Bucket(len(rows), length, gather))
            else:
                gather_q = (torch.tensor([starts[i] // cp for i in rows])[:, None] + torch.arange(queries)).flatten()
                gather_q = gather_q.clamp_(max=starts[-1] // cp - 1).to(device)
                positions = torch.zeros(len(rows), queries, dtype=torch.int64)  # padding queries see the first key
                for row, i in enumerate(rows):
                    positions[row, : lengths[i] // cp] = torch.tensor(context_slices([lengths[i]], cp, cp_rank))
                self.buckets.append(_Bucket(len(rows), length, gather, gather_q, positions.to(device)))
            offset += len(rows) * queries
            first = last
        self.restore = restore.to(device)


def context_slices(lengths: Sequence[int], cp: int, cp_rank: int) -> list[int]:
    """Which tokens of sequences lying end to end a context-parallel rank holds: of each, slices r and 2 cp - 1 - r."""
    held: list[int] = []
    start = 0
    for length in lengths:
        size = length // (2 * cp)
        for part in (cp_rank, 2 * cp - 1 - cp_rank):
            held.extend(range(start + part * size, start + (part + 1) * size))
        start += length
    return held


class _GatherTokens(torch.autograd.Function):
    """The tokens of all ranks of a group end to end; backward sums the gradients and keeps one's own tokens."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = tokens.new_empty((group.size() * tokens.shape[0], *tokens.shape[1:]))
        dist.all_gather_into_tensor(whole, tokens.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.new_empty((gradient.shape[0] // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


class TorchCoreAttention(MegatronModule):
    """Causal attention of one rank's heads over PackedSequences; grouped keys and values are shared, not copied.

    With context parallelism keys and values are gathered over the group and put back in order; each rank's queries
    attend to all keys that do not come after them.
    """

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
        """query [T, heads, q_dim], key [T, kv_heads, q_dim], value [T, kv_heads, v_dim] -> [T, heads * v_dim].

        With context parallelism T is this rank's part of the tokens.
        """
        assert isinstance(packed_seq_params, PackedSequences) and attention_bias is None
        packed = packed_seq_params
        if packed.gathered is not None:
            key, value = (
                _GatherTokens.apply(part, packed.whole_group).index_select(0, packed.gathered) for part in (key, value)
            )
        outputs = []
        for bucket in packed.buckets:
            q = self._rows(query, bucket.gather if bucket.gather_q is None else bucket.gather_q, bucket)
            k, v = (self._rows(part, bucket.gather, bucket) for part in (key, value))
            mask = None
            if bucket.positions_q is not None:
                mask = bucket.positions_q[:, None, :, None] >= torch.arange(bucket.length, device=query.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        if packed.restore is None:
            return outputs[0]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return whole.index_select(0, packed.restore)

    @staticmethod
    def _rows(tokens: torch.Tensor, gather: torch.Tensor | None, bucket: _Bucket) -> torch.Tensor:
        """[T, heads, dim] -> [rows, heads, length, dim]."""
        if gather is not None:
            tokens = tokens.index_select(0, gather)
        return tokens.unflatten(0, (bucket.rows, -1)).transpose(1, 2)
