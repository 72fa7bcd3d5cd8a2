"""`r1mega evaluate` as a user runs it, on a tiny model: whole, killed and resumed, of a training checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from adder import SUMS, kill_after_samples, response, train_adder, write_rows

# The first test waits for the model to be trained, which takes minutes where the machine has much else to do.
pytestmark = pytest.mark.timeout(900)

REPO = Path(__file__).resolve().parents[2]
HELD_OUT = SUMS[3::8]
PROBLEMS, SAMPLES = len(HELD_OUT), 8
TOTAL = PROBLEMS * SAMPLES
TEXT = {"capture_output": True, "text": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has not seen what is asked."""
    return train_adder(tmp_path_factory.mktemp("model"), [pair for pair in SUMS if pair not in HELD_OUT])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ({"question": f"{a}+{b}", "answer": str(a + b)} for a, b in HELD_OUT)
    return write_rows(tmp_path_factory.mktemp("questions") / "sums.jsonl", rows)


def command(model: Path, questions: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "r1mega.cli", "evaluate", f"model.hf={model}", "benchmark=file",
        f"benchmark.data={questions}", f"run.dir={run_dir}", "benchmark.template=r1_zero",
        f"benchmark.samples={SAMPLES}", "benchmark.max_tokens=40", "benchmark.stop=['</answer>']",
        "rollout.max_batch=8", "run.seed=3", *overrides,
    ]  # fmt: skip


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), timeout=600, check=False, **TEXT)


def samples_of(run_dir: Path) -> dict[tuple[int, int], dict]:
    path = run_dir / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["problem"], row["sample"]): row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = evaluate(model, questions, run_dir)
    assert done.returncode == 0, done.stderr
    assert f"{PROBLEMS} problems x {SAMPLES} samples" in done.stdout
    return run_dir


def test_the_report_says_what_the_samples_say(whole: Path) -> None:
    report, samples = json.loads((whole / "report.json").read_text()), samples_of(whole)
    assert len(samples) == TOTAL == report["samples"]
    right = sum(sample["score"] for sample in samples.values())
    assert len({sample["answer"] for sample in samples.values()}) > 5, "a model that has more than one thing to say"
    assert report["metrics"]["pass@1"]["value"] == pytest.approx(right / len(samples), abs=1e-6)
    assert set(report["metrics"]) == {f"{name}@{k}" for name in ("pass", "cons") for k in (4, 8)} | {"pass@1"}
    solved = [any(samples[i, j]["score"] for j in range(SAMPLES)) for i in range(PROBLEMS)]
    assert report["metrics"]["pass@8"]["value"] == pytest.approx(sum(solved) / PROBLEMS, abs=1e-6)
    assert (whole / "benchmark.png").stat().st_size > 5_000


@pytest.mark.slow
def test_killed_half_way_and_resumed_it_gives_the_same_report(
    model: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    lines = kill_after_samples(command(model, questions, run_dir), run_dir / "samples.jsonl", 36)
    assert 36 <= lines < TOTAL
    assert not (run_dir / "report.json").exists()
    done = evaluate(model, questions, run_dir, "run.resume=true")
    assert done.returncode == 0, done.stderr
    assert "samples kept" in done.stdout
    assert (run_dir / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert samples_of(run_dir) == samples_of(whole)


@pytest.mark.extended
def test_a_training_checkpoint_is_its_export_on_two_engines_too(questions: Path, model: Path, tmp_path: Path) -> None:
    """The same weights by two ways, on one process and on two: what is drawn depends on problem and sample alone."""
    rows = [{"prompt": f"{a}+{b}", "response": response(a, b)} for a, b in SUMS if (a, b) not in HELD_OUT]
    done = subprocess.run(
        [
            sys.executable, "-m", "r1mega.cli", "train", "stage=sft", "data=sft", "optim.lr=1e-3",
            f"model.hf={model}", f"data.train={write_rows(tmp_path / 'sums.jsonl', rows)}", "data.template=r1_zero",
            f"run.dir={tmp_path}/trained", "sft.updates=4", "sft.batch_size=32", "sft.max_length=256",
            "checkpoint.every=4", "logger.console=false", "logger.tensorboard=false",
        ],
        timeout=600, check=False, **TEXT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = {"hf": "hf", "checkpoint": "checkpoints/update-000004"}
    for name, place in places.items():
        engines = "rollout.engines=2" if name == "checkpoint" else "rollout.engines=1"
        done = evaluate(tmp_path / "trained" / place, questions, tmp_path / name, engines, "benchmark.plot=false")
        assert done.returncode == 0, done.stderr
    assert samples_of(tmp_path / "hf") == samples_of(tmp_path / "checkpoint")
    other = evaluate(tmp_path / "trained" / "hf", questions, tmp_path / "other", "run.seed=4", "benchmark.limit=3")
    assert other.returncode == 0, other.stderr
    texts = {key: row["text"] for key, row in samples_of(tmp_path / "hf").items() if key[0] < 3}
    assert {key: row["text"] for key, row in samples_of(tmp_path / "other").items()} != texts  # another seed
