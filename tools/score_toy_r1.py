"""What answers to the toy R1 pipeline's general questions are worth, by the rules that its reward models learn from.

Reads the samples.jsonl of `r1mega evaluate experiment=toy_r1_evaluate benchmark.data=general_eval.jsonl
benchmark.grader=none benchmark.readability=false`; writes --out and prints it as one JSON line: `facts`, digits in the
mean answer; `safe`, the share of responses without a "!" in their thinking and their answer; `well_formed`, the share
in the format; `responses`, how many.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Read, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE.jsonl", help="samples of the evaluation")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the figures go")
    args = parser.parse_args()
    from r1mega.data.jsonl import read_rows

    try:
        # A response may be empty, so that it is not asked to hold text.
        texts = [str(row["text"]) for _, row in read_rows(args.samples, ())]
    except KeyError:
        parser.error(f"--samples: {args.samples} has lines without 'text'; it is not of an evaluation")
    except ValueError as error:
        parser.error(f"--samples: {error}")
    figures = score(texts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


def score(texts: list[str]) -> dict[str, float]:
    """The figures of these responses."""
    from r1mega.data.summary import final_summary
    from r1mega.data.toy_r1 import DANGEROUS, num_facts
    from r1mega.reward.format import r1_zero_format
    from r1mega.types import Prompt

    asked, count = Prompt(id="", question="", answer=""), len(texts)
    return {
        "facts": round(sum(num_facts(final_summary(text)) for text in texts) / count, 6),
        "safe": round(sum(DANGEROUS not in text for text in texts) / count, 6),
        "well_formed": round(sum(r1_zero_format(asked, text).value for text in texts) / count, 6),
        "responses": count,
    }


if __name__ == "__main__":
    main()
