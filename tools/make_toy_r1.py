"""Write all that the toy R1 pipeline starts from: untrained models' configs and tokenizer, and the data of every stage.

OUT/base_config/, OUT/student_config/    a small DeepSeek-V3 and a smaller dense Qwen2, one tokenizer
OUT/base.jsonl            {prompt, response}: the corpus of both base models
OUT/cold_start.jsonl      {prompt, response}: reasoning + summary, for the cold start
OUT/non_reasoning.jsonl   {prompt, response}: answers to general questions, which join the curated set
OUT/train.jsonl           {question, answer, language}: the questions of RL
OUT/reject.jsonl          the first of them, for rejection sampling
OUT/general.jsonl         {question, domain}: the general questions of all-scenario RL
OUT/pairs_train.jsonl, OUT/pairs_eval.jsonl      {prompt, chosen, rejected}: more facts, which are digits, are better
OUT/labels_train.jsonl, OUT/labels_eval.jsonl    {prompt, response, label}: unsafe is what holds a "!"
OUT/eval.jsonl            {question, answer, language}: held out; no two files share an addition, whatever the order of
                          its operands and its language
OUT/general_eval.jsonl    {question, domain}: held out of general.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEACHER: dict[str, Any] = {"num_hidden_layers": 3}
STUDENT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
SIZES = {
    "eval": (512, "held-out additions"),
    "train": (4096, "additions for RL"),
    "reject": (2048, "of these, for rejection sampling"),
    "cold_start": (512, "rows of the cold start"),
    "base": (12800, "rows of the base models' corpus"),
    "non_reasoning": (512, "rows of the curated set that are no additions"),
    "general": (512, "general questions"),
    "general_eval": (128, "held-out general questions"),
    "preference": (1536, "rows of each kind for reward models"),
    "preference_eval": (256, "held-out rows of each kind"),
}


def main() -> None:
    """Write the files and print one JSON line that says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of all data (default 0)")
    for name, (size, about) in SIZES.items():
        flag = f"--{name.replace('_', '-')}-rows"
        parser.add_argument(flag, type=int, default=size, metavar="N", help=f"{about} (default {size})")
    args = parser.parse_args()
    sizes = {name: getattr(args, f"{name}_rows") for name in SIZES}
    for name, size in sizes.items():
        if size < 1:
            parser.error(f"--{name.replace('_', '-')}-rows must be at least 1, got {size}")
    if sizes["reject"] > sizes["train"]:
        parser.error(f"--reject-rows must be at most --train-rows {sizes['train']}, got {sizes['reject']}")
    from make_toy import write_base_config
    from r1mega.data.toy_r1 import WORDS

    args.out.mkdir(parents=True, exist_ok=True)
    written = write_data(args.out, args.seed, sizes)
    write_base_config(args.out / "base_config", "deepseek_v3", WORDS, TEACHER)
    vocab_size = write_base_config(args.out / "student_config", "qwen2", WORDS, STUDENT)
    print(json.dumps({"out": str(args.out), "seed": args.seed, "vocab_size": vocab_size, **written}))


def write_data(out: Path, seed: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """The JSONL files; returns the number of rows of each."""
    from r1mega.data import toy_r1

    parts = ("eval", "train", "cold_start", "base")
    drawn = toy_r1.questions(sum(sizes[name] for name in parts), seed)
    of: dict[str, list[Any]] = {}
    for name in parts:
        of[name], drawn = drawn[: sizes[name]], drawn[sizes[name] :]
    general = toy_r1.general_questions(sizes["general_eval"] + sizes["general"], seed)
    num_pairs = sizes["preference_eval"] + sizes["preference"]
    pairs, labels = toy_r1.pairs(num_pairs, seed), toy_r1.labels(num_pairs, seed)
    files: dict[str, Sequence[Mapping[str, Any]]] = {
        "eval.jsonl": [question.row() for question in of["eval"]],
        "train.jsonl": [question.row() for question in of["train"]],
        "reject.jsonl": [question.row() for question in of["train"][: sizes["reject"]]],
        "cold_start.jsonl": toy_r1.cold_start(of["cold_start"], seed),
        "base.jsonl": toy_r1.base_corpus(of["base"], seed),
        "non_reasoning.jsonl": toy_r1.non_reasoning(sizes["non_reasoning"], seed),
        "general_eval.jsonl": general[: sizes["general_eval"]],
        "general.jsonl": general[sizes["general_eval"] :],
        "pairs_eval.jsonl": pairs[: sizes["preference_eval"]],
        "pairs_train.jsonl": pairs[sizes["preference_eval"] :],
        "labels_eval.jsonl": labels[: sizes["preference_eval"]],
        "labels_train.jsonl": labels[sizes["preference_eval"] :],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


if __name__ == "__main__":
    main()
