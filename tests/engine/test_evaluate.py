"""`r1mega evaluate` with a real server, which loads the checkpoint as it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_a_server_writes_what_the_embedded_engine_writes(checkpoint, sglang_python, tmp_path: Path) -> None:
    rows = [{"question": f"What is {a} plus {a}?", "answer": str(2 * a)} for a in range(4)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(name: str, *overrides: str) -> list[str]:
        done = subprocess.run(
            [
                sys.executable, "-m", "r1mega.cli", "evaluate", f"model.hf={checkpoint('qwen2')}", "benchmark=file",
                f"benchmark.data={data}", f"run.dir={tmp_path / name}", "benchmark.template=plain",
                "benchmark.samples=2", "benchmark.temperature=0", "benchmark.max_tokens=16", *overrides,
            ],
            capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["samples"] == 8
        lines = map(json.loads, (tmp_path / name / "samples.jsonl").read_text().splitlines())
        return [row["text"] for row in sorted(lines, key=lambda row: (row["problem"], row["sample"]))]

    servers = ("rollout=sglang", f"sglang.python={sglang_python}", "benchmark.max_prompt_tokens=256")
    # Greedy: what is compared is the model, not the draw.
    assert evaluate("sglang", *servers) == evaluate("embedded")
    assert not (tmp_path / "sglang" / "engines").exists()
