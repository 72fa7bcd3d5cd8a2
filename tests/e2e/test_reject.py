"""`r1mega train stage=rejection_sampling` as a user runs it, on a tiny model: whole, killed, resumed, curated anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from r1mega.data.sft import iter_sft, tokenize_sft
from r1mega.loop.wire_evaluate import fingerprint

sys.path.insert(0, str(Path(__file__).parent))
from adder import SUMS, kill_after_samples, train_adder, write_rows

pytestmark = pytest.mark.timeout(900)

SAMPLES, ASKED = 6, 10
TEXT = {"capture_output": True, "text": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adder(tmp_path_factory.mktemp("model"), SUMS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten sums to ask, one that a benchmark holds, and a greeting that came with its answer."""
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in SUMS[3:100:10]]
    rows.append({"question": "5+5", "answer": "10"})
    rows.append({"question": "hello", "response": "Hello!", "domain": "general"})
    folder = tmp_path_factory.mktemp("questions")
    write_rows(folder / "benchmark.jsonl", [{"problem": "5 + 5"}])
    return write_rows(folder / "sums.jsonl", rows)


def command(model: Path, questions: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", "r1mega.cli", "train", "stage=rejection_sampling", f"model.hf={model}",
        f"data.train={questions}", f"run.dir={run_dir}", f"curate.samples={SAMPLES}", "curate.form=r1_zero",
        "curate.per_prompt=2", "curate.choose=random", "curate.trivial_words=1", "rollout.max_tokens=40",
        f"curate.benchmarks=[{questions.parent / 'benchmark.jsonl'}]", "rollout.stop=['</answer>']",
        "rollout.temperature=0.6", "rollout.max_batch=8", "run.seed=3", "reward.workers=0", *overrides,
    ]  # fmt: skip


def reject(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), timeout=600, check=False, **TEXT)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rejection sampling that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = reject(model, questions, run_dir)
    assert done.returncode == 0, done.stderr
    assert f"rows kept of {ASKED * SAMPLES} samples" in done.stdout
    return run_dir


def test_rows_and_report_say_what_the_samples_say(whole: Path, model: Path, questions: Path) -> None:
    samples, rows = rows_of(whole / "samples.jsonl"), rows_of(whole / "curated.jsonl")
    report = json.loads((whole / "rejection.json").read_text())
    assert len(samples) == ASKED * SAMPLES == report["samples"]
    assert report["questions"] == {"read": 12, "asked": 10, "contaminated": 1, "trivial": 1}
    assert report["kept"] == len(rows) > 5 and report["acceptance_rate"] == round((len(rows) - 1) / 60, 6)
    assert sum(report["dropped"].values()) + len(rows) == len(samples) + 1
    assert set(report["dropped"]) >= {"wrong", "duplicate"}
    maths = report["domains"]["math"]
    assert maths["right"] == sum(sample["parts"]["accuracy"] == 1 for sample in samples)
    assert maths["kept"] + sum(maths["dropped"].values()) == len(samples)
    texts = {(sample["id"], sample["sample"]): sample for sample in samples}
    for row in rows[:-1]:
        source = row["provenance"]
        sample = texts[source["prompt_id"], source["sample"]]
        assert row["response"] == sample["text"] and source["reward"] == sample["parts"]
        left, right = row["prompt"].split("+")
        assert row["response"].endswith(f"<answer>{int(left) + int(right)}</answer>") and row["answer"]
        assert source["sampler"] == {"model": str(model), "weights": fingerprint(model)}
        assert source["filters"] == ["failed", "cut_off", "wrong", "malformed", "contaminated", "duplicate", "quota"]
    assert rows[-1]["response"] == "Hello!" and rows[-1]["provenance"]["given"] is True
    assert rows[-1]["prompt"] == "hello" and rows[-1]["domain"] == "general"
    assert not any(row["prompt"] == "5+5" for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenize_sft(list(iter_sft(whole / "curated.jsonl")), tokenizer, "r1_zero", 100)) == len(rows)


@pytest.mark.extended
def test_killed_half_way_and_resumed_it_gives_the_same_rows(
    model: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    lines = kill_after_samples(command(model, questions, run_dir), run_dir / "samples.jsonl", 20)
    assert 20 <= lines < ASKED * SAMPLES
    assert not (run_dir / "rejection.json").exists()
    done = reject(model, questions, run_dir, "run.resume=true")
    assert done.returncode == 0, done.stderr
    assert "samples kept" in done.stdout
    for name in ("curated.jsonl", "rejection.json"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    # The samples are there: other filters need no engine's work, and give what they would have given at once.
    again = reject(model, questions, run_dir, "run.resume=true", "curate.per_prompt=1", "curate.choose=first")
    assert again.returncode == 0, again.stderr
    assert f"goes on with {ASKED * SAMPLES} of {ASKED * SAMPLES} samples kept" in again.stdout
    rows = rows_of(run_dir / "curated.jsonl")
    assert len({row["prompt"] for row in rows}) == len(rows) < len(rows_of(whole / "curated.jsonl"))
    other = reject(model, questions, run_dir, "run.resume=true", "rollout.temperature=0.7")
    assert other.returncode == 2 and "rollout.temperature: got 0.7; the run was started with 0.6" in other.stderr
