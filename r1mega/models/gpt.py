"""Megatron's GPTModel, ending at the hidden states, so that logits are made only where they are needed."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class HiddenStateGPT(GPTModel):
    """On the last stage `forward` returns the final hidden states [T / tp, 1, hidden] instead of logits.

    A prompt's tokens and the padding need no logits; at a vocabulary of 129,280 they are most of the memory.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        return hidden_states

    def logits(self, hidden: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Logits [R, padded vocabulary / tp] of this tensor rank's part of the vocabulary, at positions `rows_R`.

        `hidden` is what `forward` returned on the last stage. Its gradient is summed over the tensor ranks, which each
        hold a part of the vocabulary.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=group)
        return torch.nn.functional.linear(whole.squeeze(1).index_select(0, rows_R), weight)
