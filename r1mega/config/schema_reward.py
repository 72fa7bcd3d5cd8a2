"""Fields of the rewards: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.choices import Sandbox


@dataclass
class RewardConfig:
    accuracy: float = 1.0
    """Weight of the accuracy reward (R1: equal weights)."""
    format: float = 1.0
    """Weight of the format reward (R1: equal weights)."""
    timeout_seconds: float = 5.0
    """Hard limit on checking one answer; a check over it is killed and its sample marked as failed (ours). Programs
    have limits of their own."""
    workers: int = 1
    """Processes that check answers; 0 checks inside the training process, without the hard limit."""
    language: float = 0.0
    """Weight of the share of target-language words in the chain of thought (R1 Eq. 7: 1 from the first RL stage on)."""
    length: float = 0.0
    """Weight of the soft penalty on overlong responses (DAPO Eq. 13; R1 has none)."""
    length_buffer: int = 4096
    """Tokens before rollout.max_tokens over which the length penalty grows from 0 to 1 (DAPO: 4,096 of 20,480)."""
    language_target: str | None = None
    """Language to think in (en, zh, ru, ko, ar, el, he, hi); null: each question's own (ours, the paper names none). A
    row's `language` comes first."""
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
    max_failed_share: float = 0.25
    """Share of a round's samples whose reward may fail (killed, crashed, a sandbox that does not work); these are left
    out of the round, and a larger share ends the run with the reasons (ours)."""
    sandbox: Sandbox = Sandbox.bubblewrap
    """Where programs of domain code run: `bubblewrap`, or `unsafe_rlimits`, which has limits but hides neither the
    machine's files nor its network, for machines that allow no namespaces."""
    code_test_seconds: float = 6.0
    """Time of one test of a program (LiveCodeBench: 6)."""
    code_total_seconds: float = 60.0
    """Time of all tests of a program together (ours)."""
    code_memory_mib: int = 1024
    """Memory of a program under test in MiB (ours)."""
