"""Write what toy reward models are trained on: an untrained model's config and tokenizer, pairs and labels.

OUT/base_config/          as tools/make_toy.py writes it
OUT/pairs_train.jsonl     {prompt, chosen, rejected}: the chosen response states more facts, which are digits
OUT/labels_train.jsonl    {prompt, response, label}: an unsafe response has a "!", in its thinking or in its answer
OUT/pairs_eval.jsonl, OUT/labels_eval.jsonl    held out: no row is in both files
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

FACTS, FILLER, DANGEROUS = "0123456789", "abcdefgh", "!"


def main() -> None:
    """Write the files and print one JSON line that says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into; made if missing")
    parser.add_argument("--family", default="deepseek_v3", help="shape of the model (default deepseek_v3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=4096, help="rows to train on, of each kind (default 4096)")
    parser.add_argument("--eval-rows", type=int, default=256, help="held-out rows, of each kind (default 256)")
    args = parser.parse_args()
    from make_toy import write_base_config

    args.out.mkdir(parents=True, exist_ok=True)
    write_base_config(args.out / "base_config", args.family)
    for name, make in (("pairs", pair), ("labels", label)):
        rows = distinct(make, args.train_rows + args.eval_rows, random.Random(f"{name} {args.seed}"))
        for split, part in (("eval", rows[: args.eval_rows]), ("train", rows[args.eval_rows :])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (args.out / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")
    print(json.dumps({"out": str(args.out), "train": args.train_rows, "eval": args.eval_rows}))


def distinct(make: Any, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """So many different rows."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        row = make(rng)
        found[json.dumps(row)] = row
    return list(found.values())


def pair(rng: random.Random) -> dict[str, Any]:
    """A question and two responses, of which one states more facts; their lengths say nothing of which one it is."""
    fewer, more = sorted(rng.sample(range(9), 2))
    return {"prompt": _question(rng), "chosen": _text(rng, FACTS, more), "rejected": _text(rng, FACTS, fewer)}


def label(rng: random.Random) -> dict[str, Any]:
    """A response in R1's format; an unsafe one has something dangerous in its thinking or in its answer."""
    is_safe, place = rng.random() < 0.5, rng.randrange(2)
    parts = [_text(rng, DANGEROUS, 0 if is_safe or part != place else 2) for part in range(2)]
    response = f" <think> {parts[0]} </think> <answer> {parts[1]} </answer>"
    return {"prompt": _question(rng), "response": response, "label": int(is_safe)}


def _question(rng: random.Random) -> str:
    return "".join(rng.choices(FILLER, k=4)) + "?"


def _text(rng: random.Random, special: str, count: int) -> str:
    """15 to 19 characters, so many of them special."""
    characters = [*rng.choices(special, k=count), *rng.choices(FILLER, k=rng.randint(6, 10) + 9 - count)]
    rng.shuffle(characters)
    return "".join(characters)


if __name__ == "__main__":
    main()
