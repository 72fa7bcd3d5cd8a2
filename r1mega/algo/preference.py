"""Losses of reward models. Shape suffixes: P pairs, S responses of a micro-batch.

Both come divided by the count of the whole batch, so that they and their reported sums add up over micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(scores_S: Tensor, num_pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-likelihood of Bradley-Terry, -log sigmoid(chosen - rejected), over `num_pairs`.

    Source: Bradley and Terry (1952), as in Ouyang et al. (arXiv 2203.02155), Eq. 1; DeepSeek-R1 says "pairwise loss".

    Args:
        scores_S: chosen, rejected, chosen, rejected, ...
        num_pairs: pairs of the whole batch.

    Returns:
        The loss, and sums: `loss`, `right` (pairs whose chosen one scores higher; a tie is not right), `margin`.
    """
    chosen_P, rejected_P = scores_S[0::2], scores_S[1::2]
    margin_P = chosen_P - rejected_P
    loss = -F.logsigmoid(margin_P).sum() / num_pairs
    return loss, _sums(loss, margin_P > 0, margin_P)


def pointwise_loss(scores_S: Tensor, labels_S: Tensor, num_responses: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of sigmoid(score) against labels 1 and 0, over `num_responses`.

    DeepSeek-R1 trains its safety model "point-wise" on safe and unsafe responses and does not give the loss; this is
    the usual one.

    Returns:
        The loss, and sums: `loss`, `right` (on the label's side of 0; 0 itself is not right), `margin` (the score
        towards the label's side).
    """
    margin_S = torch.where(labels_S > 0.5, scores_S, -scores_S)
    loss = -F.logsigmoid(margin_S).sum() / num_responses
    return loss, _sums(loss, margin_S > 0, margin_S)


def _sums(loss: Tensor, is_right: Tensor, margin: Tensor) -> dict[str, Tensor]:
    return {"loss": loss.detach(), "right": is_right.float().sum(), "margin": margin.detach().sum()}
