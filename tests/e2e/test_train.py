"""Whole runs through the command line: real processes, real engine, real files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

QUESTIONS = [
    (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.\n#### {a + b}") for a in range(1, 7) for b in range(1, 9)
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    return path


def train(*overrides, timeout=280):
    argv = [sys.executable, "-m", "r1mega.cli", "train", *map(str, overrides)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)


def rl_overrides(checkpoint, data, run_dir):
    return [
        "experiment=r1_zero_gsm8k", f"model.hf={checkpoint}", f"data.train={data}", f"run.dir={run_dir}",
        "algo.updates=4", "algo.questions_per_round=2", "algo.group_size=4", "rollout.max_tokens=24",
        "rollout.probe=true",
        # A random model earns nothing, so the gradient is zero: decay is what moves its weights, by 1% an update.
        "optim.lr=1e-3", "optim.weight_decay=10",
    ]  # fmt: skip


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("deepseek_v3", "tp2_pp2_ep2"),
        pytest.param("llama", "single", marks=pytest.mark.extended),
        pytest.param("qwen2", "single", marks=pytest.mark.extended),
    ],
)
def test_two_rounds_of_rl(checkpoint, questions, tmp_path, family, layout):
    source, run_dir = checkpoint(family), tmp_path / "run"
    result = train(
        *rl_overrides(source, questions, run_dir), f"parallel={layout}", f"data.eval={questions}", "data.eval_limit=4",
        "rollout.engines=" + ("2" if layout != "single" else "1"), "algo.reference_refresh=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["updates"], summary["rounds"]) == (4, 2)
    assert summary["pass_at_1_first"] is not None
    gaps = [record["sync/logprob_gap_max"] for record in metrics_of(run_dir) if "sync/logprob_gap_max" in record]
    # In every round the engine generates with the trainer's weights, although each update moved them by 1%.
    assert len(gaps) == 2
    assert max(gaps) <= 1e-4
    rounds = [record for record in metrics_of(run_dir) if "time/rollout" in record]
    assert all(0 < record["sync/probe_gap_max"] <= 1e-4 for record in rounds)
    phases = [name.removeprefix("time/") for name in rounds[-1] if name.startswith("time/")]
    assert {"rollout", "inference", "train", "publish"} <= set(phases)
    assert all(rounds[-1][f"memory/{phase}/rss_{when}"] > 0.05 for phase in phases for when in ("before", "after")), (
        rounds[-1]
    )
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {sample["weight_version"] for sample in samples if sample["split"] == "train"} == {0, 2}
    assert (run_dir / "curves.png").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(run_dir / "hf").state_dict()
    base = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert any(not (trained[name] == base[name]).all() for name in base)
    assert AutoTokenizer.from_pretrained(run_dir / "hf").eos_token == "</s>"


@pytest.mark.parametrize(
    "mtp", ["train", *(pytest.param(name, marks=pytest.mark.extended) for name in ("freeze", "drop"))]
)
def test_the_layer_that_predicts_further(checkpoint, questions, tmp_path, mtp):
    from safetensors.torch import load_file

    source, run_dir = checkpoint("deepseek_v3", mtp=True), tmp_path / "run"
    result = train(*rl_overrides(source, questions, run_dir), f"model.mtp={mtp}", "algo.kl_coef=1")
    assert result.returncode == 0, result.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (source, run_dir / "hf"))
    layer = {name for name in before if name.startswith("model.layers.4.")}
    promised = json.loads((run_dir / "hf" / "config.json").read_text())["num_nextn_predict_layers"]
    if mtp == "drop":
        assert (after.keys(), promised) == (before.keys() - layer, 0)
        return
    assert (after.keys(), promised) == (before.keys(), 1)
    shared = {"model.layers.4.embed_tokens.weight": "model.embed_tokens.weight"}
    shared["model.layers.4.shared_head.head.weight"] = "lm_head.weight"
    assert all((after[name] == after[twin]).all() for name, twin in shared.items())
    own = [name for name in layer - shared.keys() if not name.endswith("e_score_correction_bias")]
    moved = {name for name in own if not (after[name] == before[name]).all()}
    assert moved == (set(own) if mtp == "train" else set())


@pytest.mark.parametrize(
    ("updates_per_round", "probe_sequences", "words"),
    [
        (1, 4, ("weights 1 did not arrive, published twice:", "engine of rank 0: its log-probs of the probe differ")),
        pytest.param(1, 0, ("rollout.probe: ", "weight version 1"), marks=pytest.mark.extended),
        (2, 0, ("rollout.probe: ", "weight version 2")),
    ],
)
def test_a_skipped_publish_is_caught(checkpoint, questions, tmp_path, updates_per_round, probe_sequences, words):
    """Publish everything but the second time, and let the version lie: the engine's log-probs give it away, by the
    probe of the publish or, without it, by the samples of the next round."""
    program = tmp_path / "skipping.py"
    program.write_text(
        "from r1mega.weights import memory\n"
        "real = memory.publish\n"
        "def skipping(weights, engine, version):\n"
        "    if version == 0:\n"
        "        return real(weights, engine, version)\n"
        "    list(weights.export_hf(wanted=engine is not None))\n"
        "    engine._weight_version = version\n"
        "memory.publish = skipping\n"
        "import runpy, sys\n"
        "sys.argv = ['worker', *sys.argv[1:]]\n"
        "runpy.run_module('r1mega.loop.worker', run_name='__main__')\n"
    )
    from r1mega.launch import supervise
    from r1mega.launch.local import worker_env

    run_dir = tmp_path / "run"
    overrides = rl_overrides(checkpoint("qwen2"), questions, run_dir)
    overrides += [f"algo.updates_per_round={updates_per_round}", f"rollout.probe_sequences={probe_sequences}"]
    composed = train(*overrides, "--cfg", "job", "--resolve")
    assert composed.returncode == 0, composed.stderr
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(composed.stdout)
    result = supervise.run_world(
        [sys.executable, str(program), "--config", str(run_dir / "config.yaml")], 1,
        log_dir=run_dir / "logs", env=worker_env("cpu", 1),
    )  # fmt: skip
    assert result.exit_code == 1
    assert all(part in result.message for part in words), result.message


@pytest.mark.parametrize(
    "family", ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.extended) for name in ("qwen2", "llama"))]
)
def test_real_questions(checkpoint, shared_data, tmp_path, family):
    """Questions of GSM8K with their published golds, prompts of the R1-Zero template."""
    run_dir = tmp_path / "run"
    data = shared_data / "gsm8k_train.jsonl"
    result = train(*rl_overrides(checkpoint(family), data, run_dir))
    assert result.returncode == 0, result.stderr
    assert json.loads((run_dir / "summary.json").read_text())["rounds"] == 2
