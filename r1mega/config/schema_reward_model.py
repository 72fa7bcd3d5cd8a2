"""Fields of the training of reward models: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RewardModelConfig:
    batch_size: int = 256
    """Pairs, or labelled responses, of one update (R1: 256)."""
    epochs: int = 1
    """How often each row is seen (R1: 1); the last update takes what is left."""
    max_length: int = 8192
    """Longest prompt plus response accepted, in tokens (R1: 8,192)."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass (ours); a pair stays together, so two responses must fit."""
