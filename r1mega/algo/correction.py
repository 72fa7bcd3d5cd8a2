"""Correction for samples that other weights, or another arithmetic, have generated than the anchor of the loss.

Shape suffix: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(anchor_logprobs_T: Tensor, rollout_logprobs_T: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(exp(anchor - rollout), cap), without gradient.

    They multiply the surrogate of each token. The engine's distribution is not the trainer's: its kernels round
    otherwise, and with a staleness bound it runs on older weights (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training", truncated importance sampling; the ratio of the loss then stays that
    of the policy to the anchor, as in Hilton et al., arXiv 2110.00641).

    Args:
        anchor_logprobs_T: by the trainer, at the weights at the start of the round.
        rollout_logprobs_T: by the engine, as it generated.
        cap: above 0; bounds the variance. 1 only ever lowers a token's weight.

    Raises:
        ValueError: the cap is not above 0.
    """
    if not cap > 0:
        raise ValueError(f"correction_cap: got {cap}; must be above 0; 0 in the configuration leaves the weights out")
    return torch.exp((anchor_logprobs_T - rollout_logprobs_T).detach()).clamp(max=cap)


def corrected(
    advantages_T: Tensor, weights_T: Tensor, anchor_logprobs_T: Tensor, rollout_logprobs_T: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The advantages times the importance weights, and sums of these over the tokens whose weight in the loss is not
    zero: `correction`, and `correction_capped`, how many are cut off.

    A factor >= 0 of the advantage is one of the surrogate, whatever the sign of either. The KL term is without it.
    """
    factors_T = importance_weights(anchor_logprobs_T, rollout_logprobs_T, cap)
    active_T = weights_T != 0
    sums = {
        "correction": torch.where(active_T, factors_T, 0.0).sum(),
        "correction_capped": (active_T & (factors_T >= cap)).float().sum(),
    }
    return advantages_T * factors_T, sums
