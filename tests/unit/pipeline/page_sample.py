"""An invented run for the tests of the page: its figures mean nothing. `python page_sample.py DIR` writes it."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
# name, what it is, held-out pass@1 at its end (three seeds), readable answers, response tokens, updates of RL
STAGES: tuple[tuple[str, str, tuple[float, ...], float, float, int], ...] = (
    ("r1_zero", "Pure RL on the base, without examples", (0.875, 0.859, 0.887), 0.62, 33.1, 60),
    ("cold_start", "SFT of the base on readable long chains of thought", (0.541, 0.52, 0.562), 0.97, 30.2, 0),
    ("reasoning_rl", "RL with accuracy and language consistency, clip 10", (0.892, 0.871, 0.904), 0.985, 34.4, 40),
    ("sft_curated", "SFT of the base on the curated mixture, 2 epochs", (0.842, 0.838, 0.861), 0.991, 33.0, 0),
    ("all_scenario_rl", "RL with rules, and reward models in the last updates", (0.901, 0.888, 0.912), 0.994, 34.9, 30),
    ("distilled_student", "SFT of the small base on the curated set", (0.612, 0.588, 0.634), 0.989, 32.8, 0),
    ("rl_student", "RL on the small base at equal compute", (0.402, 0.377, 0.441), 0.55, 27.0, 50),
)
QUESTIONS = ("What is 417 + 286?", "What is 905 + 98?")


def report() -> dict[str, Any]:
    rng = random.Random(7)
    stages: list[dict[str, Any]] = [
        {"name": "base", "about": "The toy base model", "metrics": _metrics((0.26, 0.223, 0.225), 0.31, 18.1, rng),
         "history": {}, "samples": [_sample(QUESTIONS[0], " <think> 6 + 7 </think> <answer> 613 </answer>", 0.2)]},
    ]  # fmt: skip
    last, length = (0.26, 0.223, 0.225), 18.1
    for name, about, ends, readable, tokens, updates in STAGES:
        stages.append(
            {
                "name": name,
                "about": about,
                "metrics": _metrics(ends, readable, tokens, rng),
                "history": _history(last, ends, length, tokens, updates, rng) if updates else {},
                "samples": [_sample(question, _response(question, name), 1.2) for question in QUESTIONS],
            }
        )
        last, length = ends, tokens
        if name == "reasoning_rl":
            stages.append(
                {"name": "rejection_sampling", "about": "Samples of the RL model, kept where right and readable",
                 "metrics": {"samples": 24576, "kept": 9120, "mixed_language_share": 0.034}}
            )  # fmt: skip
    return {"title": "toy_r1: an invented run", "seeds": list(SEEDS), "seconds": 4102.7, "stages": stages,
            "findings": findings()}  # fmt: skip


def findings() -> list[dict[str, Any]]:
    return [
        {"name": "rl_raises_accuracy", "claim": "Pure RL raises held-out accuracy over the base", "value": 0.8737,
         "baseline": 0.236, "difference": 0.6377, "interval": [0.604, 0.671], "holds": True, "note": ""},
        {"name": "cold_start_readability", "claim": "Cold start raises the share of well-formed answers over R1-Zero",
         "value": 0.97, "baseline": 0.62, "difference": 0.35, "interval": [0.311, 0.389], "holds": True,
         "note": "Counted on 512 held-out questions for each seed."},
        {"name": "language_consistency", "claim": "The language reward raises consistency, at a small cost in accuracy",
         "value": 0.998, "baseline": 0.934, "difference": 0.064, "interval": [0.048, 0.081], "holds": True,
         "note": "Accuracy 89.2% with the reward, 89.9% without."},
        {"name": "curated_beats_cold_start", "claim": "The curated SFT model beats the cold-start one", "value": 0.847,
         "baseline": 0.541, "difference": 0.306, "interval": [0.268, 0.343], "holds": True, "note": ""},
        {"name": "length_grows", "claim": "Responses grow longer while accuracy rises", "value": 33.1, "baseline": 18.1,
         "difference": 15.0, "interval": None, "holds": None, "note": "One seed only: no interval."},
        {"name": "rl_after_curated", "claim": "All-scenario RL raises accuracy over the curated SFT model",
         "value": 0.9003, "baseline": 0.897, "difference": 0.0033, "interval": [-0.0112, 0.0178], "holds": False,
         "note": "At this size the task is solved before; the figures do not tell the two apart."},
    ]  # fmt: skip


def lineage() -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def node(id: str, kind: str, path: str, stage: str | None, sources: tuple[str, ...] = (), **counts: Any) -> None:
        digest = hashlib.sha256(id.encode()).hexdigest()
        nodes.append({"id": id, "kind": kind, "path": path, "sha256": digest, "stage": stage, "counts": counts})
        edges.extend({"from": source, "to": id, "stage": stage} for source in sources)

    node("base", "checkpoint", "inputs/base", None, parameters=188608)
    node("student_base", "checkpoint", "inputs/student_base", None, parameters=51200)
    node("questions", "prompts", "inputs/train.jsonl", None, rows=4096)
    node("held_out", "prompts", "inputs/held_out.jsonl", None, rows=512)
    node("general", "prompts", "inputs/general.jsonl", None, rows=640)
    node("zero", "checkpoint", "r1_zero/hf", "r1_zero", ("base", "questions"), updates=60)
    node("cold_set", "samples", "cold_start/collected.jsonl", "cold_start_data", ("zero", "questions"), rows=812)
    node("cold", "checkpoint", "cold_start/hf", "cold_start", ("base", "cold_set"), updates=120)
    node("rl1", "checkpoint", "reasoning_rl/hf", "reasoning_rl", ("cold", "questions"), updates=40)
    node("kept", "samples", "rejection/kept.jsonl", "rejection_sampling", ("rl1", "questions", "held_out"), rows=9120)
    node("mixture", "samples", "mixture/train.jsonl", "mixture", ("kept", "general"), rows=9760, tokens=341233)
    node("sft", "checkpoint", "sft_curated/hf", "sft_curated", ("base", "mixture"), updates=240)
    node("r1", "checkpoint", "all_scenario_rl/hf", "all_scenario_rl", ("sft", "questions", "general"), updates=30)
    node("student", "checkpoint", "student/hf", "distilled_student", ("student_base", "mixture"), updates=240)
    node("student_rl", "checkpoint", "student_rl/hf", "rl_student", ("student_base", "questions"), updates=50)
    for model in ("zero", "cold", "rl1", "sft", "r1", "student", "student_rl"):
        node(f"{model}_scores", "report", f"evaluation/{model}/report.json", f"evaluate_{model}", (model, "held_out"))
    works = list(dict.fromkeys(one["stage"] for one in nodes if one["stage"]))
    stages = [
        {"name": name, "about": f"What {name} does", "key": hashlib.sha256(name.encode()).hexdigest(),
         "seconds": 12.5 * (3 + i), "counts": {"updates": 10 * i},
         "config": {"algo": {"lr": 3e-4, "group_size": 16}, "run": {"seed": 0}}}
        for i, name in enumerate(works)
    ]  # fmt: skip
    return {"nodes": nodes, "edges": edges, "stages": stages}


def write(run_dir: Path, report_: dict[str, Any] | None = None, lineage_: dict[str, Any] | None = None) -> Path:
    """Both files in `run_dir`, which is returned."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.json", report_ or report()), ("lineage.json", lineage_ or lineage())):
        (run_dir / name).write_text(json.dumps(content, ensure_ascii=True), encoding="utf-8")
    return run_dir


def _metrics(passes: tuple[float, ...], readable: float, tokens: float, rng: random.Random) -> dict[str, Any]:
    def around(value: float, spread: float) -> dict[str, float]:
        return {str(seed): round(value + rng.uniform(-spread, spread), 4) for seed in SEEDS}

    return {
        "eval/pass_at_1": dict(zip(map(str, SEEDS), passes, strict=True)),
        "well_formed": around(min(readable, 0.99), 0.008),
        "language_consistency": around(0.96, 0.03),
        "cut_off": around(0.03, 0.02),
        "eval/response_tokens": around(tokens, 0.6),
    }


def _history(
    first: tuple[float, ...], last: tuple[float, ...], length: float, tokens: float, updates: int, rng: random.Random
) -> dict[str, Any]:
    def rise(low: float, high: float, step: int, noise: float) -> list[list[float]]:
        def at(update: int) -> float:
            return low + (high - low) * (1 - math.exp(-5 * update / updates)) + rng.uniform(-noise, noise)

        return [[update, round(at(update), 4)] for update in range(0 if step > 1 else 1, updates + 1, step)]

    pairs = list(zip(map(str, SEEDS), first, last, strict=True))
    return {
        "reward/accuracy": {seed: rise(low, high, 1, 0.05) for seed, low, high in pairs},
        "eval/pass_at_1": {seed: rise(low, high, 10, 0.012) for seed, low, high in pairs},
        "rollout/response_tokens": {seed: rise(length, tokens, 1, 1.4) for seed in map(str, SEEDS)},
        "train/kl": {seed: rise(0, 0.04, 1, 0.002) for seed in map(str, SEEDS)},
        "train/entropy": {seed: rise(0.62, 0.21, 1, 0.02) for seed in map(str, SEEDS)},
    }


def _sample(question: str, response: str, reward: float) -> dict[str, Any]:
    return {"question": question, "response": response, "reward": reward}


def _response(question: str, stage: str) -> str:
    left, right = (int(part.strip("?")) for part in question.removeprefix("What is ").split(" + "))
    work, carry = [], 0
    for digit in range(3):
        one, other = left // 10**digit % 10, right // 10**digit % 10
        total = one + other + carry
        work.append(f"{one} + {other} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    thinking = "\n".join(work) if stage != "r1_zero" else " ; ".join(work) + " 嗯 " + work[0]
    return f" <think> {thinking} </think> <answer> {left + right} </answer>"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
