"""Choose pairs for a helpful reward model: a judge's margin over a limit, and lengths that tell nothing.

Reads lines {prompt, chosen, rejected, margin}, where `margin` is how much better a judge found the chosen response
(DeepSeek-R1: the mean of four judgements, kept where it is over 1), and writes those that are kept. Pairs that remain
are thinned out until the chosen response is the longer one as often as the rejected one, at every ratio of lengths.
Prints one JSON line with the counts and the mean lengths before and after.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Read, choose, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE.jsonl", help="pairs with margins")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the kept ones go")
    parser.add_argument("--min-margin", type=float, default=1.0, help="kept are margins above it (default 1, R1's)")
    parser.add_argument("--tokenizer", metavar="DIR", help="count tokens by it; without it characters are counted")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are left out (default 0)")
    args = parser.parse_args()
    try:
        rows = _rows(args.input)
        count = _counter(args.tokenizer)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    clear = [row for row in rows if row["margin"] > args.min_margin]
    kept = choose(clear, count, args.seed)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    summary = {"read": len(rows), "over_margin": len(clear), "kept": len(kept)}
    print(json.dumps(summary | {"before": _lengths(clear, count), "after": _lengths(kept, count)}))


def choose(rows: Sequence[dict[str, Any]], count: Callable[[str], int], seed: int) -> list[dict[str, Any]]:
    """The rows to keep, in their order."""
    from r1mega.data.preference import balance_lengths

    lengths = [tuple(map(count, _texts(row))) for row in rows]
    return [rows[index] for index in balance_lengths(lengths, seed=seed)]


def _texts(row: dict[str, Any]) -> tuple[str, str]:
    from r1mega.data.summary import final_summary

    return final_summary(row["chosen"]), final_summary(row["rejected"])


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows, checked as for training. Raises ValueError naming `path:line`."""
    from r1mega.data.jsonl import read_rows
    from r1mega.data.preference import read_pairs

    read_pairs(path)
    rows = []
    for line, row in read_rows(path, ("prompt", "chosen", "rejected")):
        margin = row.get("margin")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"{path}:{line}: 'margin': got {margin!r}; must be a number; judge the pair first")
        rows.append(row)
    return rows


def _counter(tokenizer: str | None) -> Callable[[str], int]:
    if tokenizer is None:
        return len
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: len(loaded.encode(text, add_special_tokens=False))


def _lengths(rows: Sequence[dict[str, Any]], count: Callable[[str], int]) -> dict[str, float]:
    """Mean lengths of both sides, and how often the chosen one is longer; zeros where there is no row."""
    pairs = [tuple(map(count, _texts(row))) for row in rows]
    number = max(1, len(pairs))
    return {
        "chosen": round(sum(chosen for chosen, _ in pairs) / number, 1),
        "rejected": round(sum(rejected for _, rejected in pairs) / number, 1),
        "chosen_longer": round(sum(chosen > rejected for chosen, rejected in pairs) / number, 3),
    }


if __name__ == "__main__":
    main()
