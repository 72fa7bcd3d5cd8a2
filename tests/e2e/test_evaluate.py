"""`r1mega evaluate` as a user runs it, on a tiny model of a few SFT updates: whole, killed and resumed, of a training
checkpoint, refused."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

# The first test waits for the model to be trained, which takes minutes where the machine has much else to do.
pytestmark = pytest.mark.timeout(900)

REPO = Path(__file__).resolve().parents[2]
SUMS = [(a, b) for a in range(10) for b in range(10)]
HELD_OUT = SUMS[3::8]  # 13 problems
TEXT = {"capture_output": True, "text": True}


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny model that has learned what sums look like: hf/ and a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    make = [sys.executable, str(REPO / "tools" / "make_toy.py"), "--out", str(folder), "--family", "qwen2"]
    sizes = ["--sft-rows", "1", "--train-rows", "1", "--eval-rows", "1"]
    subprocess.run([*make, *sizes], check=True, timeout=100, **TEXT)
    rows = [
        {"prompt": f"{a}+{b}", "response": f"<think>{a}+{b}</think> <answer>{a + b}</answer>"}
        for a, b in SUMS
        if (a, b) not in HELD_OUT
    ]
    done = subprocess.run(
        [
            sys.executable, "-m", "r1mega.cli", "train", "experiment=toy_base", "parallel=single", "optim.lr=1e-2",
            f"model.hf={folder}/base_config", f"data.train={write_rows(folder / 'sums.jsonl', rows)}",
            f"run.dir={folder}/run", "sft.updates=30", "sft.batch_size=32", "checkpoint.every=30",
            "logger.console=false", "logger.tensorboard=false",
        ],
        timeout=600, check=False, **TEXT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = ({"question": f"{a}+{b}", "answer": str(a + b)} for a, b in HELD_OUT)
    return write_rows(tmp_path_factory.mktemp("questions") / "sums.jsonl", rows)


def command(model: Path, questions: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "r1mega.cli", "evaluate", f"model.hf={model}", "benchmark=file",
        f"benchmark.data={questions}", f"run.dir={run_dir}", "benchmark.template=r1_zero", "benchmark.samples=8",
        "benchmark.max_tokens=40", "benchmark.stop=['</answer>']", "rollout.max_batch=8", "run.seed=3", *overrides,
    ]  # fmt: skip


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), timeout=600, check=False, **TEXT)


def samples_of(run_dir: Path) -> dict[tuple[int, int], dict]:
    path = run_dir / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["problem"], row["sample"]): row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(trained: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = evaluate(trained / "hf", questions, run_dir)
    assert done.returncode == 0, done.stderr
    assert "13 problems x 8 samples" in done.stdout
    return run_dir


def test_the_report_says_what_the_samples_say(whole: Path) -> None:
    report, samples = json.loads((whole / "report.json").read_text()), samples_of(whole)
    assert len(samples) == 13 * 8 == report["samples"]
    right = sum(sample["score"] for sample in samples.values())
    assert 0 < right < len(samples), "the model has to be neither perfect nor useless"
    assert report["metrics"]["pass@1"]["value"] == pytest.approx(right / len(samples), abs=1e-6)
    assert set(report["metrics"]) == {"pass@1", "pass@4", "pass@8", "cons@4", "cons@8"}
    solved = [any(samples[i, j]["score"] for j in range(8)) for i in range(13)]
    assert report["metrics"]["pass@8"]["value"] == pytest.approx(sum(solved) / 13, abs=1e-6)
    assert (whole / "benchmark.png").stat().st_size > 5_000


@pytest.mark.slow
def test_killed_half_way_and_resumed_it_gives_the_same_report(
    trained: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(trained / "hf", questions, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 500
    path = run_dir / "samples.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 36:
        assert time.monotonic() < limit and process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert 36 <= len(samples_of_torn(path)) < 13 * 8
    assert not (run_dir / "report.json").exists()
    with path.open("ab") as file:
        file.write(b'{"problem": 3, "samp')  # what a kill within a write leaves
    done = evaluate(trained / "hf", questions, run_dir, "run.resume=true")
    assert done.returncode == 0, done.stderr
    assert "samples kept" in done.stdout
    assert (run_dir / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert samples_of(run_dir) == samples_of(whole)


def samples_of_torn(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


@pytest.mark.slow
def test_a_training_checkpoint_two_engines_and_another_seed(
    trained: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "checkpoints" / "update-000030"
    done = evaluate(checkpoint, questions, tmp_path / "run", "rollout.engines=2", "benchmark.plot=false")
    assert done.returncode == 0, done.stderr
    # The same weights by another way, on two processes: what is drawn depends on problem and sample alone.
    assert samples_of(tmp_path / "run") == samples_of(whole)
    other = evaluate(trained / "hf", questions, tmp_path / "other", "run.seed=4", "benchmark.limit=3")
    assert other.returncode == 0, other.stderr
    texts = [row["text"] for row in samples_of(tmp_path / "other").values()]
    assert texts != [row["text"] for (i, _), row in sorted(samples_of(whole).items()) if i < 3]


def test_other_problems_or_weights_are_not_mixed_with_what_is_kept(
    trained: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"question": "1+1", "answer": "2"}])
    done = evaluate(trained / "hf", other, whole, "run.resume=true")
    assert done.returncode == 2
    assert f"benchmark.data: got {other}; the samples kept in {whole} are of other problems" in done.stderr
    done = evaluate(trained / "hf", questions, whole, "run.resume=true", "benchmark.temperature=1")
    assert "benchmark.temperature: got 1.0; the run was started with 0.6" in done.stderr
    done = evaluate(trained / "hf", questions, whole)
    assert "already holds a run" in done.stderr
