"""Megatron's GPTModel, ending at the hidden states, so that logits are made only where they are needed."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from r1mega.models.attention import PackedSequences


class HiddenStateGPT(GPTModel):
    """On the last stage `forward` returns the final hidden states [T / tp, 1, hidden] instead of logits; see `head`.

    A prompt's tokens and the padding need no logits; at a vocabulary of 129,280 they are most of the memory.

    While `looks_further` is set, the multi-token-prediction layer runs too, and its hidden states follow the model's:
    [2 T / tp, 1, hidden]. With `trains_trunk` false no gradient of theirs reaches the model below or its tables.
    """

    looks_further = False
    trains_trunk = True

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *_args: object,
        packed_seq_params: PackedSequences | None = None,
        **_kwargs: object,
    ) -> torch.Tensor:
        if not (self.mtp_process and self.looks_further):
            return hidden_states
        both = self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=hidden_states if self.trains_trunk else hidden_states.detach(),
            attention_mask=None,
            packed_seq_params=packed_seq_params.shortened(),
            embedding=self.embedding if self.trains_trunk else self._embed_without_gradient,
        )
        return both if self.trains_trunk else torch.cat([hidden_states, both.chunk(2)[1]])

    def _embed_without_gradient(self, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.embedding(**kwargs).detach()

    def head(
        self, hidden: torch.Tensor, rows_R: torch.Tensor, *, further: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What logits at positions `rows_R` are the product of: hidden states [R, hidden], and this tensor rank's rows
        of the output table [padded vocabulary / tp, hidden].

        `hidden` is what `forward` returned on the last stage; `further` takes the multi-token-prediction layer's part
        of it. Its gradient is summed over the tensor ranks, which each hold a part of the vocabulary.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if self.mtp_process and self.looks_further:
            hidden = hidden.chunk(2)[further]
        if further and not self.trains_trunk:
            weight = weight.detach()
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=group)
        return whole.squeeze(1).index_select(0, rows_R), weight

    def score(self, hidden: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
        """[E] the scores, fp32, that a reward model gives at positions `rows_E` of what `forward` returned.

        Every tensor rank works out the same scores with a copy of the head of its own: gradients need no sum over them.
        """
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        chosen_EH = hidden.squeeze(1).index_select(0, rows_E)
        return (chosen_EH.float() @ self.output_layer.weight.float().t()).squeeze(1)
