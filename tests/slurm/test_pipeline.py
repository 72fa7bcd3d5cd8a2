"""A pipeline as jobs of a real Slurm: a program, a training over two nodes that reads what it left, and another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.pipeline import lineage

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]

STAGES = """
# Three jobs, of which each waits for the one before.
sources:
  base: {{path: {model}, kind: checkpoint}}
  rows: {{path: {rows}}}
stages:
  mixed:
    run: tool
    tool: {copying}
    arguments: ["{{rows}}", "{{out}}"]
    inputs: {{rows: rows}}
    outputs: {{out: {{path: rows.jsonl, kind: prompts}}}}
  rl:
    experiment: toy
    overrides: {overrides}
    inputs: {{model.hf: base, data.train: mixed.out}}
  again:
    run: tool
    tool: {program}
    arguments: ["{{model}}", "{{out}}"]
    inputs: {{model: rl.model}}
    outputs: {{out: {{path: names.json, kind: report}}}}
"""


def test_three_jobs_one_after_the_other(runs, tmp_path: Path) -> None:
    given = dict(word.split("=", 1) for word in runs.overrides("unused"))
    model, rows, _dir = given.pop("model.hf"), given.pop("data.train"), given.pop("run.dir")
    chosen = [f"{field}={value}" for field, value in given.items() if field != "experiment"]
    chosen += ["algo.updates=4", "checkpoint.every=2"]
    one_line = tmp_path / "conf" / "pipeline"
    one_line.mkdir(parents=True)
    program = tmp_path / "names.py"
    program.write_text(
        "import json, os, sys\njson.dump({'files': len(os.listdir(sys.argv[1]))}, open(sys.argv[2], 'w'))\n"
    )
    copying = tmp_path / "copying.py"
    copying.write_text("import shutil, sys\nshutil.copyfile(*sys.argv[1:])\n")
    text = STAGES.format(copying=copying, program=program, model=model, rows=rows, overrides=json.dumps(chosen))
    (one_line / "three.yaml").write_text(text)
    root = runs.place / "pipeline"
    command = [
        sys.executable, "-m", "r1mega.cli", "pipeline", "--config-dir", str(tmp_path / "conf"), "pipeline=three",
        f"run.dir={root}",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "pipeline.submit=true"], env=runs.cluster.env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    jobs = json.loads((root / "jobs" / "jobs.json").read_text())
    assert list(jobs) == ["mixed", "rl", "again"]
    again = subprocess.run(
        [*command, "pipeline.submit=true"], env=runs.cluster.env, capture_output=True, text=True, timeout=180
    )
    assert again.returncode == 2 and f"job {jobs['again']} of stage again is PENDING" in again.stderr
    state = runs.cluster.wait_for_state(jobs["again"], ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], 400)
    said = "".join(path.read_text() for path in sorted((root / "jobs" / "logs").glob("slurm-*.out")))
    assert state == "COMPLETED", said
    log = (root / "stages" / "rl" / "stage.log").read_text()
    assert f"job {jobs['rl']}, start 0, on n1 n2: starts" in log
    assert (root / "stages" / "rl" / "logs" / "rank1.log").exists()
    found = json.loads((root / "lineage.json").read_text())
    assert lineage.problems(found) == [] and "base" in lineage.ancestors(found, "again.out")
    left = subprocess.run([*command, "--dry-run"], env=runs.cluster.env, capture_output=True, text=True, timeout=180)
    assert left.returncode == 0 and "# 0 jobs" in left.stdout, left.stderr
