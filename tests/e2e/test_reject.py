"""`r1mega train stage=rejection_sampling` as a user runs it, on a tiny model: whole, killed, resumed, curated anew."""

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
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import make_toy
from r1mega.data.order import EpochOrder
from r1mega.data.sft import iter_sft, tokenize_sft
from r1mega.data.toy_tokenizer import save_tokenizer
from r1mega.loop.wire_evaluate import fingerprint

pytestmark = pytest.mark.timeout(900)

SUMS = [(a, b) for a in range(10) for b in range(10)]
SAMPLES, ASKED = 6, 10
TEXT = {"capture_output": True, "text": True}


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after a few updates of SFT: it knows what an answer looks like, and some of the sums."""
    folder = tmp_path_factory.mktemp("model")
    make_toy.write_base_config(folder / "base_config", "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base_config")
    rows = [{"prompt": f"{a}+{b}", "response": f"<think>{a}+{b}</think> <answer>{a + b}</answer>"} for a, b in SUMS]
    examples = tokenize_sft(list(iter_sft(write_rows(folder / "sums.jsonl", rows))), tokenizer, "r1_zero", 64)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base_config"))
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3, weight_decay=0.0)
    order = EpochOrder(len(examples), 0, True, "sums")
    for _ in range(60):
        batch = [examples[index] for index in order.next(32)]
        longest = max(len(example.token_ids) for example in batch)
        ids = torch.tensor([(*e.token_ids, *(0,) * (longest - len(e.token_ids))) for e in batch])
        mask = torch.tensor([(*e.loss_mask, *(0,) * (longest - len(e.loss_mask))) for e in batch])
        made(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.save_pretrained(folder / "hf")
    save_tokenizer(tokenizer, folder / "hf")
    return folder / "hf"


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
    process = subprocess.Popen(
        command(model, questions, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 500
    path = run_dir / "samples.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < limit and process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    whole_lines = path.read_bytes().count(b"\n")
    assert 20 <= whole_lines < ASKED * SAMPLES
    assert not (run_dir / "rejection.json").exists()
    with path.open("ab") as file:
        file.write(b'{"problem": 3, "samp')  # what a kill within a write leaves
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
