"""Whole runs of reward models through the command line: training, going on, and their scores inside RL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from parity.tiny_checkpoints import SHAPES
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
def models(tmp_path_factory) -> dict[str, Path]:
    """A helpful and a safety model as transformers writes them, of random weights."""
    made = {}
    for seed, name in enumerate(("helpful", "safety")):
        config = AutoConfig.for_model("qwen2", **SHAPES["qwen2"], num_labels=1)
        torch.manual_seed(seed)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(made[name])
    return made


DOMAINS = ["math", "helpful", "harmless"]


@pytest.fixture(scope="module")
def rl_run(models, checkpoint, tmp_path_factory) -> Path:
    """Two updates of RL, in the second of which the models count."""
    place = tmp_path_factory.mktemp("rl")
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(12)]
    general = [{"question": f"{i}+2?", "domain": DOMAINS[1 + i % 2]} for i in range(12)]
    train(
        "experiment=r1_zero_gsm8k", f"model.hf={checkpoint('qwen2')}", f"run.dir={place / 'run'}",
        f"data.train={write_rows(place / 'qa.jsonl', rows)}", "data.template=plain", "data.shuffle=false",
        f"data.general={write_rows(place / 'general.jsonl', general)}", "data.general_share=0.67",
        "algo.updates=2", "algo.updates_per_round=1", "algo.questions_per_round=3", "algo.group_size=2",
        "rollout.max_tokens=24", "reward.workers=0", "reward.preference_from=1",
        "reward.helpful=2", f"reward.helpful_model={models['helpful']}",
        "reward.safety=1", f"reward.safety_model={models['safety']}",
    )  # fmt: skip
    return place / "run"


def reference_score(model, tokens) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([tokens])).logits)


def test_their_scores_join_the_rewards_from_an_update_on(models, checkpoint, rl_run):
    first, second = (rounds.read(rl_run, number) for number in (1, 2))
    # Before the window no general question is asked, and none of the others is judged by a model.
    assert {group.prompt.domain for group in first.groups} == {"math"}
    assert [group.prompt.domain for group in second.groups] == DOMAINS
    for sample in (*second.groups[0].samples, *(sample for group in first.groups for sample in group.samples)):
        assert set(sample.score.parts) == {"accuracy", "format"}, "of a question of mathematics"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    asked = {
        name: AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        for name, path in models.items()
    }
    found = {name: [] for name in asked}
    for group in second.groups[1:]:
        name = {"helpful": "helpful", "harmless": "safety"}[group.prompt.domain]
        for sample in group.samples:
            ids = sample.token_ids
            assert tokenizer.eos_token_id not in ids, "a sample that ended: choose another seed"
            if name == "helpful":
                ids = tokenizer.encode(final_summary(tokenizer.decode(ids)), add_special_tokens=False)
            expected = reference_score(asked[name], [*group.prompt.token_ids, *ids, tokenizer.eos_token_id])
            if name == "safety":
                expected = torch.tensor(expected).sigmoid().item()
            parts, weight = sample.score.parts, {"helpful": 2, "safety": 1}[name]
            assert sample.score.error is None and set(parts) == {"format", name}
            assert parts[name] == pytest.approx(expected, rel=0, abs=TOLERANCE)
            assert sample.score.value == pytest.approx(parts["format"] + weight * parts[name])
            found[name].append(parts[name])
    last = metrics_of(rl_run)[-1]
    for name, values in found.items():
        assert last[f"reward/{name}"] == pytest.approx(sum(values) / 2)
        assert abs(values[0] - values[1]) > 10 * TOLERANCE, "scores that are alike say nothing"


@pytest.mark.extended
def test_a_replay_asks_no_model(models, rl_run):
    for path in models.values():
        path.rename(path.with_name(path.name + "-away"))
    try:
        argv = [sys.executable, "-m", "r1mega.cli", "replay", str(rl_run), "round=2", "update=2"]
        again = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    finally:
        for path in models.values():
            path.with_name(path.name + "-away").rename(path)
    assert again.returncode == 0 and json.loads(again.stdout)["identical"], again.stdout + again.stderr


@pytest.mark.extended
def test_a_resumed_training_is_the_same(checkpoint, tmp_path):
    """Four updates, the last of half a batch; and the last two again from the checkpoint between."""
    rows = [{"prompt": f"{i}?", "response": f"it is {i}", "label": i % 2} for i in range(14)]
    data, whole, run_dir = write_rows(tmp_path / "labels.jsonl", rows), tmp_path / "whole", tmp_path / "run"
    asked = [
        "stage=reward_model_safety", "data=labels", f"model.hf={checkpoint('qwen2')}", f"data.train={data}",
        f"data.eval={data}", "data.template=plain", "reward_model.batch_size=4", "reward_model.max_length=128",
        "optim.lr=1e-3", "optim=cosine", "checkpoint.every=2",
    ]  # fmt: skip
    train(*asked, f"run.dir={whole}")
    shutil.copytree(whole, run_dir)
    for name in ("hf", "checkpoints/update-000004"):
        shutil.rmtree(run_dir / name)
    latest = run_dir / "checkpoints" / "latest"
    latest.write_text(latest.read_text().replace("000004", "000002"))
    train(*asked, f"run.dir={run_dir}", "run.resume=true")
    assert metrics_of(run_dir) == metrics_of(whole)
    assert [line["update"] for line in metrics_of(whole)] == [0, 1, 2, 3, 4]
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run_dir, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "score.weight" in ours and "lm_head.weight" not in ours


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
