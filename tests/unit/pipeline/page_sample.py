"""An invented run for the tests of the page: its figures mean nothing. `python page_sample.py DIR` writes it."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

SEEDS = ("0", "1", "2")
Metrics = dict[str, Any]
# name, what it is, held-out pass@1 at its end of three seeds, well-formed answers, response tokens, updates of RL
MODELS: tuple[tuple[str, str, tuple[float, ...], float, float, int], ...] = (
    ("r1_zero", "pure RL on the base, without examples", (0.875, 0.859, 0.887), 0.62, 33.1, 60),
    ("cold_start", "SFT of the base on readable long chains of thought", (0.541, 0.52, 0.562), 0.97, 30.2, 0),
    ("reasoning_rl", "RL with accuracy and language consistency, clip 10", (0.892, 0.871, 0.904), 0.985, 34.4, 40),
    ("sft_curated", "SFT of the base on the curated mixture, 2 epochs", (0.842, 0.838, 0.861), 0.991, 33.0, 0),
    ("all_scenario", "RL with rules, and reward models in the last updates", (0.901, 0.888, 0.912), 0.994, 34.9, 30),
    ("student", "SFT of the small base on the curated set", (0.612, 0.588, 0.634), 0.989, 32.8, 0),
    ("student_rl", "RL on the small base at equal compute", (0.402, 0.377, 0.441), 0.55, 27.0, 50),
)
BASE = (0.26, 0.223, 0.225)
QUESTIONS = ("What is 417 + 286?", "What is 905 + 98?")


def report() -> dict[str, Any]:
    """A training stage and an evaluation for each model, and a stage that samples."""
    rng = random.Random(7)
    samples = [_sample(QUESTIONS[0], " <think> 6 + 7 </think> <answer> 613 </answer>", 0.0)]
    stages = [_stage("base_eval", "the base before anything", _evaluated(BASE, 0.31, 18.1, rng), samples=samples)]
    last, length = BASE, 18.1
    for name, about, ends, well_formed, tokens, updates in MODELS:
        history = _history(last, ends, length, tokens, updates, rng) if updates else _losses(rng)
        metrics = {metric: {seed: points[-1][1] for seed, points in by.items()} for metric, by in history.items()}
        stages.append(_stage(name, about, metrics, history, [_sample(f"Training question of {name}", "7", 1.0)]))
        samples = [_sample(question, _response(question, name), 1.0) for question in QUESTIONS]
        stages.append(_stage(f"{name}_eval", f"of {name}", _evaluated(ends, well_formed, tokens, rng), samples=samples))
        last, length = ends, tokens
        if name == "reasoning_rl":
            metrics = {"samples": 24576, "kept": 9120, "mixed_language_share": 0.034}
            stages.append(
                {"name": "rejection", "about": "samples of the RL model, right and readable", "metrics": metrics}
            )
    return {"title": "toy_r1: an invented run", "seeds": [int(seed) for seed in SEEDS], "seconds": 4102.7,
            "stages": stages, "findings": findings()}  # fmt: skip


def findings() -> list[dict[str, Any]]:
    return [
        {"name": "rl_raises_accuracy", "claim": "Pure RL raises held-out accuracy over the base", "value": 0.8737,
         "baseline": 0.236, "difference": 0.6377, "interval": [0.604, 0.671], "holds": True, "note": ""},
        {"name": "cold_start_readability", "claim": "Cold start raises the share of well-formed answers over R1-Zero",
         "value": 0.97, "baseline": 0.62, "difference": 0.35, "interval": [0.311, 0.389], "holds": True,
         "note": "so in 3 of 3 seeds; 95% interval of their mean difference (Student's t)"},
        {"name": "language_consistency", "claim": "The language reward raises consistency, at a small cost in accuracy",
         "value": 0.998, "baseline": 0.934, "difference": 0.064, "interval": [0.048, 0.081], "holds": True,
         "note": "Accuracy 89.2% with the reward, 89.9% without."},
        {"name": "curated_beats_cold_start", "claim": "The curated SFT model beats the cold-start one", "value": 0.847,
         "baseline": 0.541, "difference": 0.306, "interval": [0.268, 0.343], "holds": True, "note": ""},
        {"name": "length_grows", "claim": "Responses grow longer while accuracy rises", "value": 33.1, "baseline": 18.1,
         "difference": 15.0, "interval": None, "holds": None, "note": "not measured in 2 of 3 seeds"},
        {"name": "rl_after_curated", "claim": "All-scenario RL raises accuracy over the curated SFT model",
         "value": 0.9003, "baseline": 0.897, "difference": 0.0033, "interval": [-0.0112, 0.0178], "holds": False,
         "note": "At this size the task is solved before; the figures do not tell the two apart."},
    ]  # fmt: skip


def lineage() -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def node(id: str, kind: str, path: str, sources: tuple[str, ...] = (), **counts: Any) -> None:
        digest, stage = hashlib.sha256(id.encode()).hexdigest(), id.rpartition(".")[0] or None
        nodes.append({"id": id, "kind": kind, "path": path, "sha256": digest, "stage": stage, "counts": counts})
        edges.extend({"from": source, "to": id, "stage": stage} for source in sources)

    node("base", "checkpoint", "inputs/base", files=6, bytes=812345)
    node("student_base", "checkpoint", "inputs/student_base", files=6, bytes=312345)
    node("questions", "prompts", "inputs/train.jsonl", rows=4096)
    node("held_out", "prompts", "inputs/held_out.jsonl", rows=512)
    node("general", "prompts", "inputs/general.jsonl", rows=640)
    node("r1_zero.model", "checkpoint", "stages/r1_zero/hf", ("base", "questions"), bytes=812345)
    node("cold_rows.rows", "samples", "stages/cold_rows/rows.jsonl", ("r1_zero.model", "questions"), rows=812)
    node("cold_start.model", "checkpoint", "stages/cold_start/hf", ("base", "cold_rows.rows"), bytes=812345)
    node("reasoning_rl.model", "checkpoint", "stages/reasoning_rl/hf", ("cold_start.model", "questions"), bytes=812345)
    node("rejection.rows", "samples", "stages/rejection/kept.jsonl", ("reasoning_rl.model", "questions", "held_out"),
         rows=9120)  # fmt: skip
    node(
        "mixture.rows", "samples", "stages/mixture/rows.jsonl", ("rejection.rows", "general"), rows=9760, tokens=341233
    )
    node("sft_curated.model", "checkpoint", "stages/sft_curated/hf", ("base", "mixture.rows"), bytes=812345)
    node("all_scenario.model", "checkpoint", "stages/all_scenario/hf", ("sft_curated.model", "questions", "general"))
    node("student.model", "checkpoint", "stages/student/hf", ("student_base", "mixture.rows"), bytes=312345)
    node("student_rl.model", "checkpoint", "stages/student_rl/hf", ("student_base", "questions"), bytes=312345)
    for name, *_ in MODELS:
        node(
            f"{name}_eval.report",
            "report",
            f"stages/{name}_eval/report.json",
            (f"{name}.model", "held_out"),
            bytes=9999,
        )
    works = list(dict.fromkeys(one["stage"] for one in nodes if one["stage"]))
    stages = [
        {"name": name, "about": f"What {name} does", "key": hashlib.sha256(name.encode()).hexdigest(),
         "seconds": 12.5 * (3 + i), "counts": {"updates": 10 * i}, "code": {"version": "0.1.0", "commit": "4f2a91c"},
         "config": {"run": "train", "experiment": name, "overrides": ["algo.lr=3e-4", "optim.updates=60"]}}
        for i, name in enumerate(works)
    ]  # fmt: skip
    return {"nodes": nodes, "edges": edges, "stages": stages}


def write(run_dir: Path, report_: dict[str, Any] | None = None, lineage_: dict[str, Any] | None = None) -> Path:
    """Both files in `run_dir`, which is returned."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.json", report_ or report()), ("lineage.json", lineage_ or lineage())):
        (run_dir / name).write_text(json.dumps(content, ensure_ascii=True), encoding="utf-8")
    return run_dir


def _stage(
    name: str, about: str, metrics: Metrics, history: Metrics | None = None, samples: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {"name": name, "about": about, "metrics": metrics, "history": history or {}, "samples": samples or []}


def _evaluated(passes: tuple[float, ...], well_formed: float, tokens: float, rng: random.Random) -> Metrics:
    def around(value: float, spread: float) -> dict[str, float]:
        return {seed: round(value + rng.uniform(-spread, spread), 4) for seed in SEEDS}

    return {
        "pass_at_1": dict(zip(SEEDS, passes, strict=True)),
        "well_formed": around(min(well_formed, 0.99), 0.008),
        "language_consistency": around(0.96, 0.03),
        "cut_off": around(0.03, 0.02),
        "response_tokens": around(tokens, 0.6),
    }


def _rise(low: float, high: float, updates: int, step: int, noise: float, rng: random.Random) -> list[list[float]]:
    def at(update: int) -> float:
        return low + (high - low) * (1 - math.exp(-5 * update / updates)) + rng.uniform(-noise, noise)

    return [[update, round(at(update), 4)] for update in range(0 if step > 1 else 1, updates + 1, step)]


def _history(
    first: tuple[float, ...], last: tuple[float, ...], length: float, tokens: float, updates: int, rng: random.Random
) -> Metrics:
    pairs = list(zip(SEEDS, first, last, strict=True))
    return {
        "reward/accuracy": {seed: _rise(low, high, updates, 1, 0.05, rng) for seed, low, high in pairs},
        "eval/pass_at_1": {seed: _rise(low, high, updates, 10, 0.012, rng) for seed, low, high in pairs},
        "rollout/response_tokens": {seed: _rise(length, tokens, updates, 1, 1.4, rng) for seed in SEEDS},
        "train/kl": {seed: _rise(0, 0.04, updates, 1, 0.002, rng) for seed in SEEDS},
        "train/entropy": {seed: _rise(0.62, 0.21, updates, 1, 0.02, rng) for seed in SEEDS},
    }


def _losses(rng: random.Random) -> Metrics:
    return {"train/loss": {seed: _rise(2.1, 0.3, 120, 2, 0.03, rng) for seed in SEEDS}}


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
