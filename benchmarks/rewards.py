#!/usr/bin/env python
"""Answers a second and core: the accuracy reward beside math-verify called directly with its own time limit.

Both judge the same pairs, in blocks that take turns: known answers against themselves, in another wording and against
other problems' answers. Time is that of the processor, so that a busy machine does not count; each block is of pairs
neither side has seen, and the reward's memory of earlier verdicts is cleared before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from r1mega.reward import math as rewards
from r1mega.types import Prompt

FILES = {"math500_dev.jsonl": "answer", "gsm8k_test_dev.jsonl": "answer"}


def pairs_of(path: Path, problems: int | None) -> list[tuple[str, str]]:
    """(known answer, an answer) of each problem three times: its own with a blank, as a fraction, another problem's."""
    with path.open(encoding="utf-8") as lines:
        golds = [rewards.gold_text(json.loads(line)["answer"]) for line in lines][:problems]
    others = golds[7:] + golds[:7]
    pairs = []
    for gold, other in zip(golds, others, strict=True):
        pairs += [(gold, f"{gold} "), (gold, f"\\frac{{2({gold})}}{{2}}"), (gold, other)]
    return pairs


def ours(pairs: list[tuple[str, str]]) -> list[bool]:
    """Verdicts of the reward on whole responses."""
    rewards._compare.cache_clear()
    return [
        rewards.accuracy(Prompt("p", "q", gold), f"<think> x </think> <answer> \\boxed{{{answer}}} </answer>").value
        == 1.0
        for gold, answer in pairs
    ]


def theirs(pairs: list[tuple[str, str]]) -> list[bool]:
    """Verdicts of math-verify, as its documentation calls it: each answer in its box, five seconds for each step."""
    from math_verify import parse, verify

    return [verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")) for gold, answer in pairs]


def main() -> int:
    """Print the figures. Returns the exit status: 1 where the reward is the slower one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with " + " and ".join(FILES))
    parser.add_argument("--problems", type=int, help="the first so many of each file (default all)")
    parser.add_argument("--block", type=int, default=90, help="pairs in a block (default 90)")
    options = parser.parse_args()
    rewards.prepare_accuracy()
    theirs([("\\sqrt{2}+x", "\\frac{2}{4}")])
    is_slower = False
    for name in FILES:
        pairs = pairs_of(options.data / name, options.problems)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        disagreements = 0
        for start in range(0, len(pairs), options.block):
            block = pairs[start : start + options.block]
            verdicts = {}
            order = [("ours", ours), ("theirs", theirs)]
            for label, judge in order if start // options.block % 2 else reversed(order):
                began = time.process_time()
                verdicts[label] = judge(block)
                seconds[label].append((time.process_time() - began) / len(block))
            disagreements += sum(a != b for a, b in zip(verdicts["ours"], verdicts["theirs"], strict=True))
        rates = {label: 1 / statistics.fmean(values) for label, values in seconds.items()}
        is_slower |= rates["ours"] < rates["theirs"]
        print(
            f"{name}: {len(pairs)} pairs, r1mega {rates['ours']:,.0f}/s, math-verify {rates['theirs']:,.0f}/s, "
            f"{rates['ours'] / rates['theirs']:.2f} times; they differ on {disagreements}"
        )
    return int(is_slower)


if __name__ == "__main__":
    sys.exit(main())
