"""Whole runs with real servers: the launcher starts them, the trainer publishes to them, learns from what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # with YaRN, tp=2 does not start on CPU
TOLERANCE = 1e-4  # fp32 summed in other orders: measured 1e-5
CASES = {
    "deepseek_v3": (
        {"rope_parameters": PLAIN_ROPE},
        ("parallel=tp2_pp2_ep2", "rollout.engines=2", "sglang.tp=2", "sglang.ep=2", "sglang.transport=ipc",
         "sglang.bucket_bytes=20000"),
    ),  # fmt: skip
    "qwen2": ({}, ("rollout.engines=1", "parallel.tp=2", "sglang.transport=ipc")),
    "llama": ({}, ("rollout.engines=1", "algo.updates_per_round=1", "algo.updates=2")),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"#### {a + b}"} for a in range(6) for b in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.timeout(500)
@pytest.mark.parametrize("family", list(CASES))
def test_two_rounds(checkpoint, questions, sglang_python, tmp_path, family, record_property) -> None:
    options, overrides = CASES[family]
    source, run_dir = checkpoint(family, **options), tmp_path / "run"
    argv = [
        sys.executable, "-m", "r1mega.cli", "train", "experiment=r1_zero_gsm8k", "rollout=sglang",
        f"model.hf={source}", f"data.train={questions}", f"run.dir={run_dir}", f"sglang.python={sglang_python}",
        "algo.updates=4", "algo.questions_per_round=4", "algo.group_size=4", "rollout.max_tokens=24",
        "rollout.probe=true", "rollout.max_batch=16", "algo.updates_per_round=2", "logger.console=false",
        # A random model earns nothing, so the gradient is zero: decay is what moves its weights, by 1% an update.
        "optim.lr=1e-3", "optim.weight_decay=10", *overrides,
    ]  # fmt: skip
    result = subprocess.run(argv, capture_output=True, text=True, timeout=480)
    assert result.returncode == 0, result.stderr[-5000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sync/logprob_gap_max"] for row in rows if "sync/logprob_gap_max" in row]
    record_property("largest gap of log-probs", max(gaps))
    assert len(gaps) == 2 and 0 < max(gaps) <= TOLERANCE
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["rounds"] == 2
    # Nothing is left: no weights beside the export, no process.
    assert (run_dir / "hf" / "model.safetensors").is_file() and not (run_dir / "engines").exists()
    assert [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or ())] == []
