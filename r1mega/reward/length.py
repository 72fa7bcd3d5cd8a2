"""The soft penalty on overlong responses (DAPO, arXiv 2503.14476, Eq. 13).

It looks at tokens, which only the sample has, and so is added to the scores of a round when they are all there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from r1mega.types import SampleGroup

PART = "length"


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then linear down to -1 at max_tokens, and -1 beyond."""
    over = num_tokens - (max_tokens - buffer)
    return -min(max(over, 0) / buffer, 1.0)


def add_length_penalty(groups: Sequence[SampleGroup], weight: float, max_tokens: int, buffer: int) -> None:
    """Add the weighted penalty to the scores in place, as part `length`. A failed score stays failed."""
    for group in groups:
        for sample in group.samples:
            if sample.score is None:
                continue
            penalty = overlong_penalty(len(sample.token_ids), max_tokens, buffer)
            assert PART not in sample.score.parts, f"{sample.prompt_id}: the length has been counted before"
            sample.score = replace(
                sample.score,
                value=sample.score.value + weight * penalty,
                parts=sample.score.parts | {PART: penalty},
            )
