"""The program that scores a file: what it prints, in which order, and how it complains."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from r1mega.reward.sandbox import SandboxError, open_sandbox

PROGRAM = Path(__file__).resolve().parents[3] / "tools" / "score_samples.py"
HANGING = "<answer> 9^{9^{9^9}} </answer>"


def write(tmp_path: Path, *rows: dict | str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def run(path: Path, reward: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROGRAM, "--reward", reward, "--input", path, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def program() -> ModuleType:
    # By its name, so that workers find it too; tests/conftest.py has put tools/ on the path.
    return importlib.import_module("score_samples")


def test_maths_in_order_with_a_line_that_hangs(tmp_path: Path) -> None:
    half = "\\frac{1}{2}"
    rows = [
        {"response": "<answer> 2/4 </answer>", "answer": half},
        {"response": HANGING, "answer": half},
        {"response": "<answer> 1/3 </answer>", "answer": half},
        {"response": "\\boxed{0.5}", "answer": ["7", half]},
    ]
    done = run(write(tmp_path, *rows), "math", "--timeout", "2")
    assert done.returncode == 1  # a reward failed
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["score"] for line in lines] == [1.0, 0.0, 0.0, 1.0]
    assert lines[0]["parts"] == {"accuracy": 1.0}
    assert lines[1]["error"] == "no score within 2 s; the worker was stopped"
    assert lines[1]["seconds"] == 2.0
    assert lines[2]["reason"] == "accuracy: wrong answer"
    assert all({"score", "parts", "reason", "seconds"} <= line.keys() for line in lines)
    assert "4 lines in" in done.stderr and "1 failed" in done.stderr


def test_code(tmp_path: Path) -> None:
    try:
        open_sandbox("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))
    tests = [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]
    rows = [
        {"response": f"```python\n{source}\n```", "tests": tests} for source in ("print(int(input()) * 2)", "print(4)")
    ]
    done = run(write(tmp_path, *rows), "code", "--workers", "2", "--test-seconds", "20")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["score"] == 1.0
    assert (second["score"], second["reason"]) == (0.0, "accuracy: test 2 of 2: wrong output")


def test_choice_format_and_language(tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "response": "<think> we add слово </think> <answer> B </answer>", "answer": "green",
        "options": ["red", "green", "blue", "none"], "question": "Which?",
    }  # fmt: skip
    for reward, score in (("choice", 1.0), ("format", 1.0), ("language", 2 / 3)):
        assert program.main(["--reward", reward, "--input", str(write(tmp_path, row))]) == 0
        assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        ("math", "{", "in.jsonl:1: not valid JSON"),
        ("math", {"answer": "1"}, "in.jsonl:1: 'response' must be text"),
        ("math", {"response": "1"}, "in.jsonl:1: key 'answer' is missing"),
        ("code", {"response": "1"}, "in.jsonl:1: 'tests' must be a list"),
        ("choice", {"response": "1", "answer": "A"}, "in.jsonl:1: 'options' must be a list"),
        ("language", {"response": "1", "question": 5}, "in.jsonl:1: 'question' must be text"),
    ],
)
def test_a_bad_line_is_one_clear_error(
    tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str], reward: str, row: dict | str, message: str
) -> None:
    assert program.main(["--reward", reward, "--input", str(write(tmp_path, row))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("score_samples: ") and message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_missing_file_and_a_missing_sandbox(
    tmp_path: Path, program: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.main(["--reward", "math", "--input", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    open_sandbox.cache_clear()
    path = write(tmp_path, {"response": "x", "tests": [{"input": "", "output": ""}]})
    try:
        assert program.main(["--reward", "code", "--input", str(path)]) == 2
    finally:
        open_sandbox.cache_clear()
    assert "apt-get install bubblewrap" in capsys.readouterr().err
