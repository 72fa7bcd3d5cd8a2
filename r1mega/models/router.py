"""The router as DeepSeek-V3 describes it (section 2.1.2), on packed sequences cut over tensor and context ranks.

Megatron's TopKRouter takes a pack for one sequence, counts padding among the tokens of an expert, and weighs its
balance loss for a loss that is divided by a count of tokens later. Here each sequence is balanced for itself, padding
counts for nothing, and the balance loss joins a loss that is already divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

from r1mega.models.attention import PackedSequences


class SequenceRouter(TopKRouter):
    """Top-k routing with fp32 gating, a bias that balances the experts, and the sequence-wise balance loss (Eq. 17-20).

    `packed` describes the sequences whose tokens come next; `SequenceLayer` sets it.
    """

    packed: PackedSequences | None = None

    def _owners(self) -> torch.Tensor:
        """[tokens of this rank] which sequence of the pack each is of; -1 for padding."""
        owners = self.packed.owners
        if self.config.sequence_parallel:
            owners = owners.chunk(self.tp_group.size())[self.tp_group.rank()]
        return owners

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Count the tokens of each expert, which the bias is moved by after the update. Padding does not count."""
        super()._apply_expert_bias(routing_map, padding_mask=(self._owners() < 0)[:, None])

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        *_shape: Any,
        **_unused: Any,
    ) -> torch.Tensor:
        """Attach the balance loss to `probs`: alpha times the mean over the update's sequences of sum_i f_i P_i.

        f_i = experts / (top_k T) x (tokens of the sequence that choose expert i), P_i = mean over its T tokens of the
        affinity to i among all affinities. What a rank adds is its own tokens' part of P.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        packed, owners = self.packed, self._owners()
        if coefficient == 0 or not packed.num_tokens.numel():
            return probs
        valid, owner = owners >= 0, owners.clamp(min=0)
        chosen = routing_map * valid[:, None]
        counts_SE = probs.new_zeros(packed.num_tokens.numel(), chosen.shape[1]).index_add(
            0, owner, chosen.to(probs.dtype)
        )
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts_SE, group=self.tp_cp_group)
        length_S1 = packed.num_tokens.to(probs.dtype)[:, None]
        fraction_SE = counts_SE * chosen.shape[1] / (self.topk * length_S1)
        share_TE = (fraction_SE / length_S1)[owner] * valid[:, None]
        loss = coefficient * packed.balance_weight * (share_TE * scores_for_aux_loss).sum()
        return MoEAuxLossAutoScaler.apply(probs, loss)


@torch.no_grad()
def expert_load(chunks: Sequence[torch.nn.Module], group: dist.ProcessGroup) -> dict[str, float]:
    """How evenly the tokens since the last update fell on the experts of these models' layers. Collective over `group`,
    the ranks of a pipeline stage.

    The load of an expert is its tokens over the layer's mean. `expert_load_max` is the largest of all layers,
    `expert_load_sum` the sum over the layers of their largest, `experts_idle` the share of experts without a token,
    summed over the layers, and `expert_layers` their number.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, SequenceRouter)]
    routers = [router for router in routers if router.enable_expert_bias]
    if not routers:
        return {}
    tokens_LE = torch.stack([router.local_tokens_per_expert for router in routers])
    if group.size() > 1:
        dist.all_reduce(tokens_LE, group=group)
    tokens_LE = tokens_LE[tokens_LE.sum(1) > 0]  # a layer that did not run, as a frozen prediction layer
    if not len(tokens_LE):
        return {}
    largest_L = tokens_LE.amax(1) / tokens_LE.mean(1)
    return {
        "expert_load_max": float(largest_L.max()),
        "expert_load_sum": float(largest_L.sum()),
        "experts_idle": float((tokens_LE == 0).float().mean(1).sum()),
        "expert_layers": float(len(tokens_LE)),
    }


class SequenceLayer(TransformerLayer):
    """A layer that tells its router which sequences the tokens are of."""

    def forward(self, *args: Any, packed_seq_params: PackedSequences | None = None, **kwargs: Any):
        """See TransformerLayer."""
        self.mlp.router.packed = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
