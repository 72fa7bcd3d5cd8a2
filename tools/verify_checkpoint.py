#!/usr/bin/env python
"""Read two checkpoints again, in Hugging Face's format or Megatron's, and say where their weights differ.

    python tools/verify_checkpoint.py DIR DIR [--logits] [--workers N] [--json FILE]

Equal means to the last bit: FP8 blocks by what they dequantise to, a wider dtype once rounded to the narrower one, FP8
also where it is exactly what quantising the other side gives. --logits also runs a forward pass of both where the model
fits into memory: safetensors through transformers, a Megatron checkpoint through Megatron-Core's own loading, in fp32
on the CPU; the log-probs must agree to 1e-4 (sums in another order; a wrong layout moves them by whole units), unless
one side was rounded: then the difference is only shown.
Exit code 0: the same weights; 1: they differ; 2: a checkpoint cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

_SHOWN = 20
MAX_LOGPROB_DIFF = 1e-4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("left", type=Path, metavar="DIR", help="a checkpoint")
    top.add_argument("right", type=Path, metavar="DIR", help="another")
    top.add_argument("--logits", action="store_true", help="also compare the log-probs of random tokens")
    cores = len(os.sched_getaffinity(0))
    top.add_argument("--workers", type=int, default=min(8, cores), help="processes (default: %(default)s)")
    top.add_argument("--json", type=Path, metavar="FILE", help="write the verdict there")
    return top


def main() -> int:
    """Compare and print."""
    arguments = parser().parse_args()
    from r1mega.config.checkpoint_files import is_megatron
    from r1mega.conversion.progress import Bar
    from r1mega.conversion.verify import verify

    sides = [("megatron" if is_megatron(path) else "hf", path) for path in (arguments.left, arguments.right)]
    try:
        with Bar("comparing") as bar:
            verdict = verify(sides[0], sides[1], workers=arguments.workers, progress=bar.update)
        gap = _logprob_gap(sides) if arguments.logits else None
    except ValueError as error:
        print(f"verify_checkpoint: {error}", file=sys.stderr)
        return 2
    for difference in verdict.differences[:_SHOWN]:
        print(difference)
    if len(verdict.differences) > _SHOWN:
        print(f"... and {len(verdict.differences) - _SHOWN:,} tensors more")
    rounded = f", {verdict.rounded:,} of them once rounded" if verdict.rounded else ""
    same_tensors = verdict.tensors - sum(not difference.is_missing for difference in verdict.differences)
    print(f"{same_tensors:,} of the {verdict.tensors:,} tensors that both have are the same{rounded}")
    same = not verdict.differences
    if gap is not None and verdict.rounded:
        print(f"log-probs of both models differ by {gap:.3g} at most, which is what rounding the weights does")
    elif gap is not None:
        print(f"log-probs of both models differ by {gap:.3g} at most; {MAX_LOGPROB_DIFF:g} is allowed")
        same = same and gap <= MAX_LOGPROB_DIFF
    if arguments.json:
        content = {
            "same": same,
            "tensors": verdict.tensors,
            "rounded": verdict.rounded,
            "max_logprob_diff": gap,
            "differences": [vars(difference) for difference in verdict.differences],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


def _logprob_gap(sides: list[tuple[str, Path]]) -> float:
    """The largest difference of log-probs of random tokens. Raises ValueError where a model is too large for it."""
    from parity.forward import logprobs

    # transformers first: Megatron lays its bridge to the CPU over the whole process.
    ours, theirs = (logprobs(kind, path) for kind, path in sorted(sides, key=lambda side: side[0]))
    if ours.shape != theirs.shape:
        raise ValueError(f"{sides[0][1]} and {sides[1][1]}: vocabularies of different sizes cannot be compared")
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    sys.exit(main())
