"""Rules of supervised fine-tuning: see check.py."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.choices import Loop, Packing
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

# field, bounds it must keep
SFT_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("sft.batch_size", ((">=", 1),)),
    ("sft.window", ((">=", 1),)),
    ("sft.chunks_per_update", ((">=", 0),)),
    ("sft.updates", ((">=", 1),)),
    ("sft.max_length", ((">=", 1),)),
    ("sft.max_tokens_per_micro_batch", ((">=", 1),)),
)


def check_sft_batch(config: Config) -> Iterator[Fault]:
    """What an update holds divides among the data-parallel ranks."""
    sft, parallel = config.sft, config.parallel
    if config.stage.loop is not Loop.sft:
        return
    if sft.packing is Packing.batch:
        if sft.batch_size < parallel.dp:
            constraint = f"must be at least parallel.dp={parallel.dp}: each replica needs a sequence"
            yield Fault("sft.batch_size", str(sft.batch_size), constraint, "raise sft.batch_size")
        return
    unit, of = parallel.dp, f"parallel.dp={parallel.dp}: each replica takes alike many"
    if parallel.vpp > 1:  # Megatron's interleaved schedule
        unit *= parallel.pp
        of = f"parallel.dp={parallel.dp} x parallel.pp={parallel.pp}: an interleaved pipeline takes whole rounds of it"
    if sft.chunks_per_update < 1 or sft.chunks_per_update % unit:
        nearest = max(1, round(sft.chunks_per_update / unit)) * unit
        constraint = f"sft.packing=window needs a multiple of {of}"
        yield Fault("sft.chunks_per_update", str(sft.chunks_per_update), constraint, f"use for example {nearest}")
