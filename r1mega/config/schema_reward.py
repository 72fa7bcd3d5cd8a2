"""Fields of the rewards: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """Weight of the helpful reward model's score of the final summary of an answer to a question of domain `helpful`
    (R1's last stage: 1)."""
    safety: float = 0.0
    """Weight of the probability that the safety reward model gives the whole response to a question of domain
    `harmless` of being safe (R1's last stage: 1; that the score is a probability is ours)."""
    helpful_model: str | None = None
    """Hugging Face checkpoint of the helpful reward model, of the policy's tokenizer; needed where its weight is not 0.
    It reads questions by data.template, as in its training."""
    safety_model: str | None = None
    """Hugging Face checkpoint of the safety reward model; needed where its weight is not 0."""
    preference_from: int = 0
    """Update from which questions of domains `helpful` and `harmless` are asked and reward models count (R1's last
    stage: 1,300 of 1,700)."""
    judge: float = 0.0
    """Weight of a generative judge's verdict, 1 where the answer is the ground truth and 0 where not (R1 judges data
    for rejection sampling so; in RL ours). A round's verdicts are recorded, but another run may get others."""
    judge_domains: list[str] = field(default_factory=lambda: ["logic"])
    """Domains of the questions whose answers are judged: `logic`, where none is given (ours)."""
    judge_url: str | None = None
    """Server of the judge, http://HOST:PORT with OpenAI's chat completions (SGLang has them)."""
    judge_model: str | None = None
    """Name of the model there."""
    judge_seconds: float = 120.0
    """Time of one attempt to get a verdict (ours)."""
    judge_attempts: int = 3
    """Attempts after which the sample is marked as failed and left out (ours)."""
    judge_in_flight: int = 32
    """Answers that are judged at the same time (ours)."""
