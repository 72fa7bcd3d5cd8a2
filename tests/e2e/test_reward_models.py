"""Whole runs of reward models through the command line: training, going on, and their scores inside RL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1mega.data.summary import final_summary
from r1mega.loop import rounds

TOOLS = Path(__file__).resolve().parents[2] / "tools"
QUIET = ["logger.console=false", "logger.tensorboard=false"]
# Scores lie around 1, in fp32 that other orders of adding move by some 1e-6.
TOLERANCE = 1e-5


def train(*overrides: object, timeout: float = 200) -> None:
    argv = [sys.executable, "-m", "r1mega.cli", "train", *map(str, overrides), *QUIET]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl less what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "perf/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(clocks)} for line in lines]


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """The runs of a helpful and of a safety model: four updates each, the last of them of half a batch."""
    place = tmp_path_factory.mktemp("models")
    pairs = [{"prompt": f"{i}?", "chosen": f"<think>{i}</think> yes {i}", "rejected": f"no {i * i}"} for i in range(14)]
    labels = [{"prompt": f"{i}?", "response": f"it is {i}", "label": i % 2} for i in range(14)]
    runs = {}
    for name, form, rows in (("helpful", "pairs", pairs), ("safety", "labels", labels)):
        path, runs[name] = write_rows(place / f"{form}.jsonl", rows), place / name
        train(
            f"stage=reward_model_{name}", f"data={form}", f"model.hf={checkpoint('qwen2')}", f"data.train={path}",
            f"data.eval={path}", "data.template=plain", "reward_model.batch_size=4", "reward_model.max_length=128",
            "optim.lr=1e-3", "optim=cosine", "checkpoint.every=2", f"run.dir={runs[name]}",
        )  # fmt: skip
    return runs


def test_a_resumed_training_is_the_same(models, checkpoint, tmp_path):
    whole, run_dir = models["safety"], tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for name in ("hf", "checkpoints/update-000004", "summary.json"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "checkpoints" / "latest").write_text("update-000002\n")
    data = f"{whole.parent}/labels.jsonl"
    train(
        "stage=reward_model_safety", "data=labels", f"model.hf={checkpoint('qwen2')}", f"data.train={data}",
        f"data.eval={data}", "data.template=plain", "reward_model.batch_size=4", "reward_model.max_length=128",
        "optim.lr=1e-3", "optim=cosine", "checkpoint.every=2", f"run.dir={run_dir}", "run.resume=true",
    )  # fmt: skip
    assert metrics_of(run_dir) == metrics_of(whole)
    assert [line["update"] for line in metrics_of(whole)] == [0, 1, 2, 3, 4]
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run_dir, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "score.weight" in ours and "lm_head.weight" not in ours


def reference_score(model, tokens) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([tokens])).logits)


def test_their_scores_join_the_rewards_from_an_update_on(models, checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    domains = ["math", "helpful", "harmless"]
    rows = [{"question": f"{i}+1?", "answer": str(i + 1), "domain": domains[i % 3]} for i in range(12)]
    run_dir = tmp_path / "rl"
    train(
        "experiment=r1_zero_gsm8k", f"model.hf={checkpoint('qwen2')}", f"run.dir={run_dir}", "data.template=plain",
        f"data.train={write_rows(tmp_path / 'qa.jsonl', rows)}", "data.shuffle=false", "reward.workers=0",
        "algo.updates=2", "algo.questions_per_round=3", "algo.group_size=2", "rollout.max_tokens=24",
        "reward.preference_from=1", "reward.helpful=2", f"reward.helpful_model={models['helpful'] / 'hf'}",
        "reward.safety=1", f"reward.safety_model={models['safety'] / 'hf'}",
    )  # fmt: skip
    first, second = (rounds.read(run_dir, number) for number in (1, 2))
    assert {group.prompt.domain for group in first.groups} == {"math"}
    assert [group.prompt.domain for group in second.groups] == domains
    assert not any(
        {"helpful", "safety"} & set(sample.score.parts) for group in first.groups for sample in group.samples
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    asked = {
        name: AutoModelForSequenceClassification.from_pretrained(run / "hf", dtype=torch.float32)
        for name, run in models.items()
    }
    found = {name: [] for name in asked}
    for group in second.groups[1:]:
        name = {"helpful": "helpful", "harmless": "safety"}[group.prompt.domain]
        for sample in group.samples:
            ids = [token for token in sample.token_ids if token != tokenizer.eos_token_id]
            if name == "helpful":
                ids = tokenizer.encode(final_summary(tokenizer.decode(ids)), add_special_tokens=False)
            expected = reference_score(asked[name], [*group.prompt.token_ids, *ids, tokenizer.eos_token_id])
            if name == "safety":
                expected = torch.tensor(expected).sigmoid().item()
            parts = sample.score.parts
            assert sample.score.error is None and set(parts) == {"accuracy", "format", name}
            assert parts[name] == pytest.approx(expected, rel=0, abs=TOLERANCE)
            weight = {"helpful": 2, "safety": 1}[name]
            assert sample.score.value == pytest.approx(parts["accuracy"] + parts["format"] + weight * parts[name])
            found[name].append(parts[name])
    last = metrics_of(run_dir)[-1]
    for name, values in found.items():
        assert last[f"reward/{name}"] == pytest.approx(sum(values) / 2) and len(set(values)) == 2
    # The record says the scores: a replay asks no model, and needs none.
    for run in models.values():
        (run / "hf").rename(run / "away")
    try:
        argv = [sys.executable, "-m", "r1mega.cli", "replay", str(run_dir), "round=2", "update=2"]
        again = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    finally:
        for run in models.values():
            (run / "away").rename(run / "hf")
    assert again.returncode == 0 and json.loads(again.stdout)["identical"], again.stdout + again.stderr


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_toy_models_learn_on_four_processes(tmp_path):
    """At least 0.9 on held-out pairs and labels, TP2 x PP2 x EP2, each in under three minutes."""
    toy = tmp_path / "toy"
    subprocess.run(
        [sys.executable, TOOLS / "make_toy_preferences.py", "--out", toy, "--train-rows", "2048"],
        check=True, timeout=120, capture_output=True, env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
    )  # fmt: skip
    for name, form in (("helpful", "pairs"), ("safety", "labels")):
        run_dir, begun = tmp_path / name, time.monotonic()
        train(
            f"stage=reward_model_{name}", f"data={form}", "model=scratch", f"model.hf={toy}/base_config",
            f"data.train={toy}/{form}_train.jsonl", f"data.eval={toy}/{form}_eval.jsonl", "data.template=plain",
            "parallel=tp2_pp2_ep2", "reward_model.batch_size=64", "reward_model.max_length=160", "optim=cosine",
            "optim.lr=2e-3", "optim.warmup_updates=8", f"run.dir={run_dir}", timeout=300,
        )  # fmt: skip
        seconds, lines = time.monotonic() - begun, metrics_of(run_dir)
        print(f"{name}: {lines[0]['eval/accuracy']:.3f} -> {lines[-1]['eval/accuracy']:.3f} in {seconds:.0f} s")
        assert lines[0]["eval/accuracy"] < 0.7, "the task must not be solved by chance"
        assert lines[-1]["eval/accuracy"] >= 0.9
        assert seconds < 180


@pytest.mark.extended
def test_scores_inside_rl_are_the_same_at_four_processes(models, checkpoint, tmp_path):
    """One round at TP2 x PP2 with the samples of one process is out of reach (engines differ), so: the models' own."""
    rows = [{"question": f"{i}+1?", "answer": "1", "domain": ["helpful", "harmless"][i % 2]} for i in range(4)]
    data = write_rows(tmp_path / "qa.jsonl", rows)

    def run(layout: str) -> list[float]:
        run_dir = tmp_path / layout.replace(" ", "")
        train(
            "experiment=r1_zero_gsm8k", f"model.hf={checkpoint('qwen2')}", f"run.dir={run_dir}", "algo.updates=1",
            f"data.train={data}", "data.template=plain", "data.shuffle=false", "reward.workers=0", *layout.split(),
            "algo.questions_per_round=4", "algo.group_size=2", "rollout.max_tokens=24", "optim.lr=1e-6",
            "reward.helpful=1", f"reward.helpful_model={models['helpful'] / 'hf'}",
            "reward.safety=1", f"reward.safety_model={models['safety'] / 'hf'}",
        )  # fmt: skip
        return [sample.score.value for group in rounds.read(run_dir, 1).groups for sample in group.samples]

    with ThreadPoolExecutor(1) as pool:
        one, four = pool.map(run, ("parallel.tp=1", "parallel.tp=2 parallel.pp=2"))
    assert four == pytest.approx(one, rel=0, abs=2 * TOLERANCE)
