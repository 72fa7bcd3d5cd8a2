from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "show_samples.py"


def sample(update: int, prompt: str, reward: float | None, text: str, **fields: Any) -> dict[str, Any]:
    return {
        "update": update,
        "round": update // 4,
        "prompt_id": prompt,
        "question": f"question {prompt}",
        "answer": "42",
        "text": text,
        "reward": reward,
        "parts": {"accuracy": 1.0, "format": 0.5},
        "finish_reason": "stop",
        "num_tokens": 7,
        "weight_version": update,
        "split": "eval",
    } | fields


RECORDS = [
    sample(0, "add-1", 0.0, "early-one"),
    sample(0, "add-2", 1.0, "early-two"),
    sample(4, "once", None, "unscored", split="train"),
    sample(8, "add-1", 2.0, "<think>late thinking</think><answer>42</answer>"),
    sample(8, "add-1", 0.5, "late-worse"),
    sample(8, "add-2", 1.5, "late-two"),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "110", "PYTHONIOENCODING": "utf-8", **environment}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)


def order(output: str, *texts: str) -> list[str]:
    """`texts` in the order in which they stand in the output, without those that do not."""
    return sorted((text for text in texts if text in output), key=output.index)


ALL = ("early-one", "early-two", "unscored", "late thinking", "late-worse", "late-two")


def test_all_in_file_order(run_dir: Path) -> None:
    done = call(run_dir, "--limit", "9")
    assert (done.returncode, done.stderr) == (0, "")
    assert order(done.stdout, *ALL) == list(ALL)
    assert "reward 2 (accuracy 1, format 0.5)" in done.stdout
    assert "7 tokens, stop, weights 8" in done.stdout
    assert "not scored" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--best", "--limit", "3"], ["late thinking", "late-two", "early-two"]),
        (["--worst", "--limit", "2"], ["early-one", "late-worse"]),
        (
            ["--worst", "--limit", "9"],
            ["early-one", "late-worse", "early-two", "late-two", "late thinking", "unscored"],
        ),
        (["--round", "2"], ["late thinking", "late-worse", "late-two"]),
        (["--update", "8", "--prompt", "add-2"], ["late-two"]),
        (["--split", "train"], ["unscored"]),
        (["--limit", "1"], ["early-one"]),
    ],
)
def test_choice(run_dir: Path, options: list[str], expected: list[str]) -> None:
    assert order(call(run_dir, *options).stdout, *ALL) == expected


def test_limit_says_what_was_left_out(run_dir: Path) -> None:
    assert "2 of 6 samples" in call(run_dir, "--limit", "2").stdout
    assert "samples;" not in call(run_dir, "--limit", "6").stdout


def test_compare_puts_first_and_last_update_side_by_side(run_dir: Path) -> None:
    done = call(run_dir, "--compare", "--worst")
    pairs = {("early-one", "late-worse"), ("early-two", "late-two")}
    found = {pair for pair in pairs for line in done.stdout.splitlines() if all(text in line for text in pair)}
    assert found == pairs
    assert "unscored" not in done.stdout  # a prompt seen once has nothing to be compared with
    narrow = call(run_dir, "--compare", "--worst", COLUMNS="50").stdout
    assert order(narrow, "early-one", "late-worse") == ["early-one", "late-worse"]
    assert not any("early-one" in line and "late-worse" in line for line in narrow.splitlines())


def test_compare_without_a_pair(run_dir: Path) -> None:
    done = call(run_dir, "--compare", "--update", "8")
    assert done.returncode == 2
    assert "no prompt among these samples" in done.stderr


def test_a_sample_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "any-name.jsonl"  # a samples file itself is taken too
    path.write_text(json.dumps(sample(1, "p", 1.0, "[red]x[/red] \x1b[2J\x07 日本")) + "\n")
    output = call(path).stdout
    assert "[red]x[/red] \\x1b[2J\\x07 日本" in output
    assert "\x1b" not in output
    assert call(path, PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops\n", "not valid JSON"),
        ("[]\n", "expected a JSON object, got list"),
        (json.dumps({k: v for k, v in RECORDS[0].items() if k != "reward"}) + "\n", "field 'reward' is missing"),
        (json.dumps(RECORDS[0] | {"reward": "1"}) + "\n", "field 'reward' is '1', expected int or float or null"),
        (json.dumps(RECORDS[0] | {"update": True}) + "\n", "field 'update' is True, expected int"),
    ],
)
def test_malformed_line_is_named(run_dir: Path, line: str, said: str) -> None:
    with (run_dir / "samples.jsonl").open("a") as file:
        file.write(line)
    done = call(run_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"samples.jsonl:7: {said}" in done.stderr
    assert "Traceback" not in done.stderr


def test_absent_and_empty_files(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'samples.jsonl'}: no such file" in done.stderr
    (tmp_path / "samples.jsonl").write_text("")
    assert "holds no samples" in call(tmp_path).stderr


def test_a_filter_that_leaves_nothing_says_what_there_is(run_dir: Path) -> None:
    done = call(run_dir, "--round", "7")
    assert done.returncode == 2
    assert "--round 7: no such sample; there are 0, 1, 2" in done.stderr


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = call("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "--compare" in done.stdout
    assert min(times) < 0.5
