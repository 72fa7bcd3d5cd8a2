"""The router as DeepSeek-V3 describes it (section 2.1.2), on packed sequences cut over tensor and context ranks.

Megatron's TopKRouter takes a pack for one sequence, counts padding among the tokens of an expert, and weighs its
balance loss for a loss that is divided by a count of tokens later. Here each sequence is balanced for itself, padding
counts for nothing, and the balance loss joins a loss that is already divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

from r1mega.models.attention import PackedSequences


class _GivenChoice:
    """What Megatron's router asks instead of its own top-k: the experts given, and its own choice where none is."""

    def __init__(self, given_TK: torch.Tensor) -> None:
        self._given_TK = given_TK.to(torch.int64)
        self.counts: torch.Tensor | None = None  # [2] tokens with a given choice, of them those the router differs on

    def get_replay_topk(
        self, scores_TE: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, experts) [T, K] of each token. The scores stay the router's own, so its gradient flows."""
        with torch.no_grad():
            _, own_TK = choose(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
            is_given_T1 = self._given_TK[:, :1] >= 0
            chosen_TK = torch.where(is_given_T1, self._given_TK, own_TK)
            differs_T = (own_TK.sort(1).values != chosen_TK.sort(1).values).any(1)
            self.counts = torch.stack([is_given_T1.sum(), differs_T.sum()])
        return scores_TE.gather(1, chosen_TK), chosen_TK


class SequenceRouter(TopKRouter):
    """Top-k routing with fp32 gating, a bias that balances the experts, and the sequence-wise balance loss (Eq. 17-20).

    `packed` describes the sequences whose tokens come next; `SequenceLayer` sets it. Where it gives the experts of a
    token ("Rollout Routing Replay", arXiv 2510.11370), only their weights are this router's: its scores of these
    experts, normalised and scaled as ever. Bias and groups then have no part, the load is counted by the given choice;
    the balance loss, defined by the affinities' own top-k, stays as it is.
    """

    packed: PackedSequences | None = None
    replayed: torch.Tensor | None = None  # [2] since the last update, see _GivenChoice

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See TopKRouter."""
        choices = self.packed.choices
        if choices is None:
            return super().routing(logits, padding_mask)
        assert not self.config.moe_router_fusion, "Megatron's fused router leaves a given choice aside"
        self.router_replay = given = _GivenChoice(self._of_this_rank(choices[self.layer_number - 1]))
        try:
            found = super().routing(logits, padding_mask)
        finally:
            self.router_replay = None
        if torch.is_grad_enabled():  # once a micro-batch, also where the layer is computed again
            self.replayed = given.counts if self.replayed is None else self.replayed + given.counts
        return found

    def _owners(self) -> torch.Tensor:
        """[tokens of this rank] which sequence of the pack each is of; -1 for padding."""
        return self._of_this_rank(self.packed.owners)

    def _of_this_rank(self, values: torch.Tensor) -> torch.Tensor:
        """Of one value a token, those of the tokens that this tensor rank routes."""
        if self.config.sequence_parallel:
            values = values.chunk(self.tp_group.size())[self.tp_group.rank()]
        return values

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


@torch.no_grad()
def replay_agreement(chunks: Sequence[torch.nn.Module], group: dist.ProcessGroup) -> dict[str, float]:
    """How often the choice given to these models' routers since the last update was not their own. Collective over
    `group`, the ranks of a pipeline stage.

    `replayed` counts the tokens with a given choice, once a layer, `replayed_otherwise` those of them where the router
    would have chosen another set of experts.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, SequenceRouter)]
    counts = torch.zeros(2, dtype=torch.int64, device=routers[0].weight.device)
    for router in routers:
        if router.replayed is not None:
            counts += router.replayed
            router.replayed = None
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    given, otherwise = counts.tolist()
    return {"replayed": float(given), "replayed_otherwise": float(otherwise)}


class SequenceLayer(TransformerLayer):
    """A layer that tells its router which sequences the tokens are of."""

    def forward(self, *args: Any, packed_seq_params: PackedSequences | None = None, **kwargs: Any):
        """See TransformerLayer."""
        self.mlp.router.packed = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
