"""Answer a question by tree search over steps, guided by a process reward model. Prints one JSON line.

The model writes steps that end in --step-end and a response that ends in --answer-end; the value of a path is the
reward model's score of its last step. See r1mega/rollout/tree_search.py for what to expect of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

_NUMBERS = {"simulations": 32, "width": 4, "max-steps": 32, "max-step-tokens": 512, "seed": 0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint that writes")
    top.add_argument("--prm", type=Path, required=True, metavar="DIR", help="checkpoint that scores steps")
    top.add_argument("--question", required=True)
    top.add_argument("--template", choices=("r1_zero", "plain", "chat"), default="chat")
    top.add_argument("--step-end", default="</step>")
    top.add_argument("--answer-end", default="</answer>")
    for name, default in _NUMBERS.items():
        top.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    top.add_argument("--exploration", type=float, default=1.0, help="weight of the prior (default: %(default)s)")
    top.add_argument("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    top.add_argument("--top-p", type=float, default=0.95, help="(default: %(default)s)")
    top.add_argument("--good-label", type=int, default=-1, help="label of a good step (default: the last)")
    top.add_argument("--device", default="cpu")
    return top


def main() -> int:
    """Search; 0, or 2 where a model cannot be used."""
    arguments = parser().parse_args()
    from transformers import AutoTokenizer

    from r1mega.data.templates import prompt_ids, prompt_text
    from r1mega.models.hf_io import CheckpointReader
    from r1mega.rollout.embedded import EmbeddedEngine
    from r1mega.rollout.process_reward import ProcessRewardModel
    from r1mega.rollout.tree_search import SearchSettings, search

    names = ("step_end", "answer_end", "exploration", "temperature", "top_p", *(n.replace("-", "_") for n in _NUMBERS))
    try:
        settings = SearchSettings(**{name: getattr(arguments, name) for name in names})
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        engine = EmbeddedEngine(arguments.model, tokenizer, device=arguments.device)
        engine.load(CheckpointReader(arguments.model).stream(), 0)
        judge = ProcessRewardModel(arguments.prm, good_label=arguments.good_label, device=arguments.device)
        prompt = prompt_text(arguments.template, arguments.question, tokenizer)

        def decode(token_ids: Sequence[int]) -> str:
            ids = token_ids[:-1] if token_ids and token_ids[-1] == tokenizer.eos_token_id else token_ids
            return tokenizer.decode(ids, skip_special_tokens=False)

        def value(steps: Sequence[str]) -> float:
            told = [step for step in steps if step]
            return judge.step_scores(prompt, told)[-1] if told else 0.0

        found = search(engine, prompt_ids(arguments.template, arguments.question, tokenizer), decode, value, settings)
    except (ValueError, OSError) as error:
        print(f"tree_search: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
