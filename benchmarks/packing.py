#!/usr/bin/env python
"""How full chunks get that are packed from R1's 800k set: by windows as SFT packs them, beside two other ways.

The set's lengths are not published, the mean of each domain is (arXiv 2501.12948v2, Table 5). Lengths are drawn here
from a log-normal distribution for each domain, clipped to 16 .. 32,768 tokens, whose scale is chosen so that the mean
after clipping is the published one; its shape, --sigma, is an assumption, and the figures are to be had for several.
"""

from __future__ import annotations

import argparse
import array
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

from r1mega.algo.window_packing import plan_chunks
from r1mega.data.order import EpochOrder
from r1mega.data.sft_source import WindowSource

DOMAINS = {  # samples and mean tokens
    "math": (395_285, 6094.2),
    "code": (211_129, 7435.7),
    "stem": (10_124, 4928.8),
    "logic": (10_395, 2739.0),
    "general": (177_812, 1419.8),
}
SHORTEST = 16


def lengths_of(seed: int, sigma: float, longest: int, share: float = 1.0) -> list[int]:
    """Tokens of every sample of the set, or of a share of it, domain by domain."""
    draw, lengths = random.Random(f"{seed}/lengths"), array.array("I")
    for samples, mean in DOMAINS.values():
        normal = [draw.gauss(0, sigma) for _ in range(max(1, round(samples * share)))]
        low, high = 1.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            found = sum(_clipped(middle + z, longest) for z in normal) / len(normal)
            low, high = (middle, high) if found < mean else (low, middle)
        lengths.extend(_clipped(high + z, longest) for z in normal)
    return list(lengths)


def _clipped(log_length: float, longest: int) -> int:
    return max(SHORTEST, min(longest, round(math.exp(log_length))))


def windows(lengths: Sequence[int], args: argparse.Namespace) -> dict[str, object]:
    """One epoch as SFT takes it, every update dealt to the ranks. The chunks that wait at its end are not counted: the
    next epoch fills them."""
    order = EpochOrder(len(lengths), args.seed, True, "benchmark")
    source = WindowSource(
        order, lengths, window=args.window, max_tokens=args.max_tokens, chunks_per_update=args.chunks_per_update
    )
    started, tokens, chunks, updates, samples = time.perf_counter(), 0, 0, 0, []
    ranks, spreads = [0] * args.dp, []
    total = sum(lengths)
    while tokens < total - args.chunks_per_update * args.max_tokens and source.epoch == 0:
        batch = source.next()
        own = [lengths[row] for row in batch.rows]
        plan = plan_chunks(own, batch.chunks, dp=args.dp, max_tokens=args.max_tokens)
        for rank, mine in enumerate(plan.chunks):
            ranks[rank] += len(mine)
        work = [sum(own[i] ** 2 for chunk in mine for i in chunk) for mine in plan.chunks]
        spreads.append(max(work) / (sum(work) / len(work)))
        tokens, chunks, updates = tokens + sum(own), chunks + len(batch.chunks), updates + 1
        samples.append(len(own))
    return {
        "fill": tokens / (chunks * args.max_tokens), "chunks": chunks, "seconds": time.perf_counter() - started,
        "updates": updates, "samples": (min(samples), sum(samples) / updates, max(samples)), "ranks": ranks,
        "work": sum(spreads) / updates, "left": (total - tokens) / total,
    }  # fmt: skip


def first_fit_decreasing(lengths: Sequence[int], max_tokens: int) -> int:
    """Chunks of the whole list where each sample, longest first, goes into the first chunk that has room; by a tree of
    the most room in each half of the chunks."""
    size = 1 << (len(lengths) - 1).bit_length()
    room = [max_tokens] * (2 * size)
    used = 0
    for length in sorted(lengths, reverse=True):
        at = 1
        while at < size:
            at = 2 * at if room[2 * at] >= length else 2 * at + 1
        used = max(used, at - size + 1)
        room[at] -= length
        at //= 2
        while at:
            room[at] = max(room[2 * at], room[2 * at + 1])
            at //= 2
    return used


def sequential(lengths: Sequence[int], max_tokens: int) -> int:
    """Chunks where each sample goes into the chunk at hand, or opens the next."""
    chunks, tokens = 1, 0
    for length in lengths:
        if tokens + length > max_tokens:
            chunks, tokens = chunks + 1, 0
        tokens += length
    return chunks


def others(lengths: Sequence[int], args: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """(what, chunks, seconds) of the other ways, on the same samples in the same order."""
    order = EpochOrder(len(lengths), args.seed, True, "benchmark").next(len(lengths))
    shuffled = [lengths[row] for row in order]
    parts = [shuffled[start : start + args.window] for start in range(0, len(shuffled), args.window)]
    ways: dict[str, Callable[[], int]] = {
        "first fit decreasing, windows": lambda: sum(first_fit_decreasing(part, args.max_tokens) for part in parts),
        "first fit decreasing, whole set": lambda: first_fit_decreasing(shuffled, args.max_tokens),
        "sequential": lambda: sequential(shuffled, args.max_tokens),
    }
    for what, count in ways.items():
        started = time.perf_counter()
        yield what, count(), time.perf_counter() - started


def main() -> None:
    """Print the figures of every way, for each shape of the distribution asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sigma", type=float, nargs="*", default=[0.9], help="of the log-normal distribution")
    parser.add_argument("--window", type=int, default=4096, help="samples packed at once")
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--chunks-per-update", type=int, default=20)
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--share", type=float, default=1.0, help="of the set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for sigma in args.sigma:
        lengths = lengths_of(args.seed, sigma, args.max_tokens, args.share)
        total = sum(lengths)
        print(f"{len(lengths):,} samples, {total:,} tokens, mean {total / len(lengths):,.1f}, sigma {sigma}")
        ours = windows(lengths, args)
        print(
            f"  windows of {args.window:,}: fill {ours['fill']:.4%}, {ours['chunks']:,} chunks, {ours['seconds']:.1f} s"
        )
        fewest, mean, most = ours["samples"]
        print(
            f"    {ours['updates']:,} updates of {args.chunks_per_update} chunks, {fewest} to {most} samples, on the "
            f"mean {mean:.1f}; chunks of the ranks {ours['ranks']}; most work over the mean {ours['work']:.3f}; "
            f"{ours['left']:.3%} of the tokens left for the next epoch"
        )
        for what, chunks, seconds in others(lengths, args):
            print(f"  {what}: fill {total / (chunks * args.max_tokens):.4%}, {chunks:,} chunks, {seconds:.1f} s")


if __name__ == "__main__":
    main()
