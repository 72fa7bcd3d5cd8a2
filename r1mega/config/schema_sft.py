"""Fields of supervised fine-tuning: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.choices import Packing, PastThinking


@dataclass
class SftConfig:
    packing: Packing = Packing.batch
    """What an update is: `batch` of batch_size sequences, packed among themselves, or `window` of chunks_per_update
    chunks, cut from a window of sequences that are packed best fit at once (R1: not published)."""
    batch_size: int = 128
    """Sequences of one update with packing=batch (R1: 128); packing=window has as many as its chunks hold."""
    window: int = 4096
    """Sequences packed at once with packing=window, at most; an epoch is cut into windows of like size (ours)."""
    chunks_per_update: int = 0
    """Chunks of max_tokens_per_micro_batch tokens of one update with packing=window, over all data-parallel ranks; 0 is
    refused there (ours)."""
    updates: int = 100
    """Optimizer steps of the whole run (ours)."""
    max_length: int = 2048
    """Longest prompt plus response, or conversation, accepted, in tokens (R1: 32,768; this default is ours)."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass (ours)."""
    past_thinking: PastThinking = PastThinking.keep
    """The thinking of earlier answers of a conversation: `keep` it as it stands, or `cut` all up to `</think>`, as R1's
    chat template does; an answer whose thinking was cut is context and not learned (R1: not published)."""
    index_dir: str | None = None
    """Directory of the index of data.train, where every machine sees it: where each row stands, and its tokens. It is
    built before the first run on that file and used again; null: `index/` in the run directory."""
