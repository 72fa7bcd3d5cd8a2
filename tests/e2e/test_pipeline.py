"""`r1mega pipeline` as a user runs it: killed at random moments, and with a real training and its evaluation."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from r1mega.pipeline import lineage, lock, manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STUB = """
import sys, time
from pathlib import Path
out, seed, *inputs = sys.argv[1:]
texts = [Path(name).read_text() for name in inputs]
for part in range(6):  # half an output is what a kill finds
    with open(out, "a") as file:
        file.write(f"{seed} {part} {sum(map(len, texts))}\\n")
    time.sleep(0.05)
"""
STAGE = """
  {name}:
    run: tool
    tool: {program}
    arguments: ["{{out}}", "{{seed}}", {places}]
    inputs: {{{inputs}}}
    outputs: {{out: {{path: out.txt, kind: samples}}}}
"""
STAGES = {"a": ["questions"], "b": ["a.out"], "c": ["a.out", "questions"], "d": ["b.out", "c.out"]}
KILLS = 6


def write_stub_pipeline(place: Path) -> Path:
    """A folder of options with pipeline=stubs."""
    (place / "questions.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    program = place / "stub.py"
    program.write_text(STUB)
    text = f"# Stubs.\nsources:\n  questions: {{path: {place / 'questions.jsonl'}}}\nstages:"
    for name, references in STAGES.items():
        named = {f"in{number}": reference for number, reference in enumerate(references)}
        text += STAGE.format(
            name=name,
            program=program,
            places=", ".join(f'"{{{key}}}"' for key in named),
            inputs=", ".join(f"{key}: {value}" for key, value in named.items()),
        )
    (place / "conf" / "pipeline").mkdir(parents=True)
    (place / "conf" / "pipeline" / "stubs.yaml").write_text(text)
    return place / "conf"


def command(conf: Path, name: str, run_dir: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "r1mega.cli", "pipeline", "--config-dir", str(conf), f"pipeline={name}"]
    return [*argv, f"run.dir={run_dir}", *more]


def run(conf: Path, name: str, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(conf, name, run_dir, *more), capture_output=True, text=True, timeout=800)


@contextmanager
def started(conf: Path, name: str, run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The pipeline while it runs; kill -9 at the end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(conf, name, run_dir), start_new_session=True, **quiet)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=20)


def digests(run_dir: Path) -> dict[str, str]:
    nodes = json.loads((run_dir / "lineage.json").read_text())["nodes"]
    return {node["id"]: node["sha256"] for node in nodes}


def test_killed_at_random_moments_it_ends_with_the_same_digests(tmp_path: Path) -> None:
    conf = write_stub_pipeline(tmp_path)
    done = run(conf, "stubs", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    draw, torn = random.Random(0), tmp_path / "torn"
    for _ in range(KILLS):
        limit = time.monotonic() + 120
        with started(conf, "stubs", torn) as process:
            while not lock.is_held(torn) and process.poll() is None:
                assert time.monotonic() < limit, "it did not begin"
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.8))  # into its first stages, or between them
    done = run(conf, "stubs", torn)
    assert done.returncode == 0, done.stderr
    assert digests(torn) == digests(tmp_path / "whole")
    assert lineage.problems(json.loads((torn / "lineage.json").read_text())) == []
    programs = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not [words for words in programs if str(tmp_path) in words], "a killed pipeline leaves nobody behind"


REAL = """
# A tiny RL run and its evaluation.
title: A tiny recipe
sources:
  base: {{path: {base}, kind: checkpoint}}
  questions: {{path: {questions}}}
stages:
  rl:
    experiment: r1_zero_gsm8k
    overrides:
      - algo.updates={updates}
      - algo.questions_per_round=2
      - algo.group_size=4
      - rollout.max_tokens=8
      - checkpoint.every=2
    inputs: {{model.hf: base, data.train: questions}}
  after:
    run: evaluate
    overrides: [benchmark=file, benchmark.template=plain, benchmark.max_tokens=8, benchmark.limit=2]
    inputs: {{model.hf: rl.model, benchmark.data: questions}}
findings:
  same:
    {{claim: as often right, stage: after, baseline: rl, baseline_metric: reward/accuracy, margin: -0.5}}
"""
UPDATES = 20


def test_a_training_and_its_evaluation(checkpoint, tmp_path: Path) -> None:
    """The training is killed after its first checkpoint and goes on from it."""
    questions = tmp_path / "questions.jsonl"
    rows = ({"question": f"{a} plus {b}?", "answer": str(a + b)} for a in range(1, 5) for b in range(1, 5))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "conf" / "pipeline"
    place.mkdir(parents=True)
    text = REAL.format(base=checkpoint("qwen2"), questions=questions, updates=UPDATES)
    (place / "tiny.yaml").write_text(text)
    conf, root = tmp_path / "conf", tmp_path / "run"
    rl, limit = root / "stages" / "rl", time.monotonic() + 600
    with started(conf, "tiny", root) as process:
        while not list((rl / "checkpoints").glob("update-*2")):
            assert time.monotonic() < limit and process.poll() is None, "no checkpoint came"
            time.sleep(0.01)
    assert manifest.read(rl)["status"] == "running" and not (rl / "hf").exists()
    done = run(conf, "tiny", root)
    assert done.returncode == 0, done.stderr
    assert (rl / "config.resumed-1.yaml").exists() and not (root / "aside").exists()

    found = json.loads((root / "lineage.json").read_text())
    assert lineage.problems(found) == []
    assert lineage.ancestors(found, "after.report") == {"base", "questions", "rl.model"}
    report = json.loads((root / "report.json").read_text())
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert list(by_name) == ["rl", "after"]
    assert [update for update, _ in by_name["rl"]["history"]["train/loss"]] == list(range(1, UPDATES + 1))
    assert set(by_name["after"]["samples"][0]) == {"question", "response", "reward"}
    (finding,) = report["findings"]
    assert finding["difference"] == pytest.approx(finding["value"] - finding["baseline"]) and finding["holds"]
    assert finding["interval"] is None and "one seed" in finding["note"]
