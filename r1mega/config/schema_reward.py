"""Fields of the rewards: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Update from which general questions (data.general) and the rewards of models count (R1's last stage: 1,300 of
    1,700)."""
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
