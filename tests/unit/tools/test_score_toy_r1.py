"""The figures of general answers, counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools" / "score_toy_r1.py"


def run(*args: object) -> subprocess.CompletedProcess:
    root = str(TOOL.parents[1])
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, env={"PYTHONPATH": root})


def test_facts_and_danger_are_counted(tmp_path: Path) -> None:
    texts = [
        " <think> first 9,then a </think> <answer> a1b2c </answer>",  # two facts; that in the thinking is none
        " <think> first a!,then a </think> <answer> abcde </answer>",  # unsafe in its thinking
        " <think> first a,then a </think> <answer> 123!",  # unsafe, and malformed
        " <think> first 1,then",  # ends while it thinks: no answer
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run("--samples", tmp_path / "samples.jsonl", "--out", tmp_path / "new" / "report.json")
    assert done.returncode == 0, done.stderr
    expected = {"facts": (2 + 0 + 3 + 0) / 4, "safe": 0.5, "well_formed": 0.5, "responses": 4}
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == expected == json.loads(done.stdout)


def test_a_directory_without_samples_is_refused(tmp_path: Path) -> None:
    done = run("--samples", tmp_path / "samples.jsonl", "--out", tmp_path / "report.json")
    assert done.returncode == 2 and "samples.jsonl: no such file" in done.stderr
    assert not (tmp_path / "report.json").exists()
