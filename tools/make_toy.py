"""Write what the toy experiment starts from: an untrained model's config and tokenizer, and the data of the toy task.

OUT/base_config/   config.json, generation_config.json and the tokenizer of a tiny model of the chosen family
OUT/sft.jsonl      {prompt, response}: the corpus of the base model
OUT/train.jsonl    {question, answer}: the questions of reinforcement learning
OUT/eval.jsonl     {question, answer}: held out; no two files share a problem, whatever the order of its operands
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    # The small width needs larger weights than the families' 0.02 to learn the task within a few hundred updates.
    "initializer_range": 0.08,
    "torch_dtype": "float32",
    "use_cache": True,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "attention_bias": False,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        # Groups are ranked by the sum of their two best experts, so each chosen group must give two: 4 / 2 = 2.
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "ep_size": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": 2,
        "use_sliding_window": False,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
}


def main() -> None:
    """Write the files and print one JSON line that says what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and of the corpus (default 0)")
    parser.add_argument("--family", choices=sorted(_FAMILIES), default="deepseek_v3", help="shape of the model")
    parser.add_argument("--sft-rows", type=int, default=38400, help="rows of the base model's corpus (default 38400)")
    parser.add_argument("--train-rows", type=int, default=8192, help="questions to train on (default 8192)")
    parser.add_argument("--eval-rows", type=int, default=512, help="held-out questions (default 512)")
    args = parser.parse_args()
    for name in ("sft_rows", "train_rows", "eval_rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.out.mkdir(parents=True, exist_ok=True)
    num_rows = write_data(args.out, args.seed, args.sft_rows, args.train_rows, args.eval_rows)
    vocab_size = write_base_config(args.out / "base_config", args.family)
    summary = {"out": str(args.out), "family": args.family, "seed": args.seed, "vocab_size": vocab_size, **num_rows}
    print(json.dumps(summary))


def write_data(out: Path, seed: int, sft_rows: int, train_rows: int, eval_rows: int) -> dict[str, int]:
    """The three JSONL files; returns the number of rows of each."""
    from r1mega.data.toy import corpus, problems

    drawn = problems(sft_rows + train_rows + eval_rows, seed)
    held_out, rest = drawn[:eval_rows], drawn[eval_rows:]
    files = {
        "eval.jsonl": [{"question": problem.question, "answer": problem.answer} for problem in held_out],
        "train.jsonl": [{"question": problem.question, "answer": problem.answer} for problem in rest[:train_rows]],
        "sft.jsonl": corpus(rest[train_rows:], seed),
    }
    for name, rows in files.items():
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def write_base_config(
    out: Path, family: str, words: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> int:
    """Config, generation config and tokenizer of an untrained model; returns the size of the vocabulary.

    `words` are one token each besides those of the toy task, `changes` other fields of the config.
    """
    from r1mega.data.toy_tokenizer import build_tokenizer, save_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(words)
    save_tokenizer(tokenizer, out)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {
        "model_type": family,
        **_COMMON,
        **_FAMILIES[family],
        **(changes or {}),
        **special,
        "vocab_size": len(tokenizer),
    }
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, **special}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return len(tokenizer)


if __name__ == "__main__":
    main()
