"""Fields of the rewards: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RewardConfig:
    accuracy: float = 1.0
    """Weight of the accuracy reward (R1: equal weights)."""
    format: float = 1.0
    """Weight of the format reward (R1: equal weights)."""
    timeout_seconds: float = 5.0
    """Hard limit on checking one answer; a check over it is killed and scores 0 (ours)."""
    workers: int = 1
    """Processes that check answers; 0 checks inside the training process, without the hard limit."""
    language: float = 0.0
    """Weight of the share of target-language words in the chain of thought (R1 Eq. 7: 1 from the first RL stage on)."""
    length: float = 0.0
    """Weight of the soft penalty on overlong responses (DAPO Eq. 13; R1 has none)."""
    repetition: float = 0.0
    """Weight of the penalty on repeated passages (ours; R1 has none)."""
    helpful: float = 0.0
    """Weight of the helpful reward model's score of the final summary (R1's last stage: 1)."""
    safety: float = 0.0
    """Weight of the safety reward model's score of the whole response (R1's last stage: 1)."""
    helpful_model: str | None = None
    """Checkpoint directory of the helpful reward model; needed where its weight is not 0."""
    safety_model: str | None = None
    """Checkpoint directory of the safety reward model; needed where its weight is not 0."""
    preference_from: int = 0
    """Update from which general questions and the rewards of models count (R1's last stage: 1,300 of 1,700)."""
