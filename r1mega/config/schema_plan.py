"""Fields of `r1mega plan`: what cannot be worked out and is assumed, and how the answer is shown. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.choices import PlanFormat


@dataclass
class PlanConfig:
    format: PlanFormat = PlanFormat.table
    """`table` for people, `json` for programs: one document on standard output."""
    mfu: float = 0.4
    """Share of the accelerator's dense peak (bf16, or FP8 with precision.fp8) that layers reach while they compute:
    without pipeline bubbles, recomputed layers and communication, which are counted apart (V3's pre-training reached
    0.39 of an H800's bf16 peak, all included: 2.664 million hours for 14.8 T tokens)."""
    decode_bandwidth: float = 0.6
    """Share of the memory bandwidth that generation reads weights and cache with (ours)."""
    decode_mfu: float = 0.3
    """Share of the bf16 peak that generation reaches where its batch is large enough to be bound by it (ours)."""
    decode_step_ms: float = 20.0
    """Least time of one token of a batch: launches and latencies of the collectives of all layers (ours)."""
    network_efficiency: float = 0.7
    """Share of the links' bandwidth that collectives reach (ours)."""
    rows: int | None = None
    """Rows of data.train, or problems of the benchmark, where that file is not here: a reward model's updates and the
    length of an evaluation or a sampling follow from them. Null: AIME, MATH-500 and GPQA Diamond are known; a sampling
    (stage.loop=reject) is planned by the round."""
    mean_prompt_tokens: int | None = None
    """Mean length of a prompt; null means a quarter of the longest accepted, data.max_prompt_tokens or, of an
    evaluation, benchmark.max_prompt_tokens; where sequences are learned from, it is part of the response (ours)."""
    mean_response_tokens: int | None = None
    """Mean length of a response; null means 0.3 of the longest, of a scheduled length 0.3 of the mean of all rounds
    (R1-Zero ends at about 10,000 of 32,768 tokens, R1 Figure 3); where sequences are learned from, 0.2 of
    sft.max_length or reward_model.max_length (ours)."""
    expert_unevenness: float = 1.25
    """Tokens that the experts of the fullest rank get, over the mean of all ranks (ours)."""
    overhead_gib: float = 3.0
    """Memory of each accelerator outside torch's allocator: CUDA context, modules, NCCL's buffers (ours)."""
    allocator_slack: float = 0.08
    """What torch's allocator holds beyond what is used at the worst instant, as a share of it (ours)."""
    host_overhead_gib: float = 6.0
    """Host memory of each training process besides the tensors it keeps there: libraries, batches, records (ours)."""
    search_rows: int = 20
    """Layouts that `r1mega plan search` shows."""
    search_max_tp: int = 8
    """Largest tensor parallel size searched; within a machine in any case (ours)."""
