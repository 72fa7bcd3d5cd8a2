"""Multi-token prediction (DeepSeek-V3, section 2.2): Megatron's layer, with full recomputation on packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


class PackedMTPLayer(MultiTokenPredictionLayer):
    """Megatron saves every argument of a recomputed layer as a tensor, and fails on the parameters of a pack."""

    def _checkpointed_forward(self, forward_func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any):
        if self.config.fp8:  # Transformer Engine's own checkpoint takes any argument
            return super()._checkpointed_forward(forward_func, *args, **kwargs)
        assert not args
        hidden_states, decoder_input = kwargs.pop("hidden_states"), kwargs.pop("decoder_input")

        def run(hidden_states: torch.Tensor, decoder_input: torch.Tensor) -> torch.Tensor:
            return forward_func(hidden_states=hidden_states, decoder_input=decoder_input, **kwargs)

        return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, hidden_states, decoder_input)
