"""What a report says of a stage is what its files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.config.schema_pipeline import PipelineOutput, PipelineStage
from r1mega.pipeline import measure
from r1mega.pipeline.stage import Place, Stage


def stage_of(place: Path, run: StageRun, **outputs: PipelineOutput) -> Stage:
    spec = PipelineStage(run=run, outputs=outputs)
    stage = Stage("s", spec, Place(place, 0), (), {}, compose=lambda _overrides: pytest.fail("nothing is composed"))
    stage.dir.mkdir(parents=True)
    return stage


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_a_training(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, StageRun.train)
    rows = [{"update": i, "round": i, "time": 9.0, "reward/mean": i / 1000, "time/train": 1.0} for i in range(1, 1001)]
    rows[-1] |= {"train/loss": None, "nonfinite": ["train/loss"]}
    write(stage.dir / "metrics.jsonl", rows)
    assert measure.metrics_of(stage) == {"reward/mean": 1.0}
    points = measure.history_of(stage)["reward/mean"]
    assert len(points) == measure.MAX_POINTS and points[0] == [1, 0.001] and points[-1] == [1000, 1.0]
    write(
        stage.dir / "samples.jsonl",
        [
            {"update": 0, "split": "eval", "question": "old", "text": "a", "reward": 0.0},
            {"update": 8, "split": "train", "question": "trained", "text": "b", "reward": 1.0},
            {"update": 8, "split": "eval", "question": "new", "text": "c", "reward": 1.0},
        ],
    )
    assert measure.samples_of(stage) == [{"question": "new", "response": "c", "reward": 1.0}]


def test_of_an_evaluation(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, StageRun.evaluate)
    report = {"metrics": {"pass@1": {"value": 0.25, "low": 0, "high": 1}, "cons@4": {"value": 0.5}}, "cut_off": 0.1}
    report |= {"no_answer": None, "response_tokens": {"mean": 7.5, "max": 9}}
    (stage.dir / "report.json").write_text(json.dumps(report))
    expected = {"pass_at_1": 0.25, "cons_at_4": 0.5, "response_tokens": 7.5, "cut_off": 0.1}
    assert measure.metrics_of(stage) == expected
    assert measure.history_of(stage) == {} and measure.samples_of(stage) == []
    write(stage.dir / "benchmark.jsonl", [{"id": "q:1", "prompt": "1+1?"}, {"id": "q:2", "prompt": "2+2?"}])
    samples = [
        {"problem": 1, "sample": 0, "text": "4", "score": 1.0},
        {"problem": 0, "sample": 1, "text": "x", "score": 0},
    ]
    write(stage.dir / "samples.jsonl", samples)
    assert measure.samples_of(stage) == [{"question": "2+2?", "response": "4", "reward": 1.0}]


def test_of_a_tool(tmp_path: Path) -> None:
    outputs = {
        "report": PipelineOutput("r.json", ArtifactKind.report),
        "rows": PipelineOutput("rows.jsonl", ArtifactKind.samples),
    }
    stage = stage_of(tmp_path, StageRun.tool, **outputs)
    (stage.dir / "r.json").write_text('{"rows": 3, "share": 0.5, "name": "x", "none": null, "bad": NaN}')
    write(stage.dir / "rows.jsonl", [{"prompt": "p", "response": "r", "score": 1.0}])
    assert measure.metrics_of(stage) == {"rows": 3.0, "share": 0.5}
    assert measure.samples_of(stage) == [{"question": "p", "response": "r", "reward": 1.0}]
    (stage.dir / "r.json").write_text('{"rows": 3, "metrics": {"share": 0.25}}')
    assert measure.metrics_of(stage) == {"share": 0.25}
