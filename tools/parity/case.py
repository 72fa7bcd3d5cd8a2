"""What both sides of a comparison compute: random sequences, and the loss they take the gradient of."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sequences and the loss on them: sum of `weights` x log-prob of each response token, and what MoE models add.

    Args:
        balance_coef: alpha of the sequence-wise balance loss (V3, Eq. 17).
        bias_update_rate: step of the gate bias after each update (V3: gamma).
        choices: of each sequence the experts its tokens are sent to, [tokens - 1, MoE layers, top_k]; None: the routers
            choose.
        mtp_weight: weight of the cross-entropy two tokens ahead, where the checkpoint has the layer for it.
        updates: Adam steps taken after the comparison of gradients.
    """

    sequences: list[tuple[list[int], int]]  # tokens, how many of them at the end are the response
    weights: list[list[float]]
    balance_coef: float = 0.0
    bias_update_rate: float = 0.0
    choices: list[Tensor] | None = None
    mtp_weight: float = 0.0
    updates: int = 0
    lr: float = 1e-3
    clip_grad: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)


def random_case(vocab_size: int, *, num_sequences: int = 6, max_length: int = 48, seed: int = 0, **options) -> Case:
    """Sequences of unequal lengths with responses of unequal lengths."""
    rng = random.Random(seed)
    sequences, weights = [], []
    for _ in range(num_sequences):
        length = rng.randint(max(3, max_length // 4), max_length)
        response = rng.randint(1, length - 1)
        sequences.append(([rng.randrange(vocab_size) for _ in range(length)], response))
        weights.append([rng.uniform(-1, 1) for _ in range(response)])
    return Case(sequences, weights, **options)


def random_choices(case: Case, *, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> list[Tensor]:
    """Experts drawn without regard to any router, also from more groups than a router would take."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand((len(tokens) - 1, num_layers, num_experts), generator=generator).topk(top_k).indices.to(torch.uint8)
        for tokens, _ in case.sequences
    ]
