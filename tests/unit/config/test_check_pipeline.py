"""Every fault of a pipeline's section is found, and all of them together."""

from __future__ import annotations

from graphlib import CycleError

import pytest

from r1mega.config.check_pipeline import check_pipeline, order
from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.config.schema_pipeline import (
    PipelineConfig,
    PipelineFinding,
    PipelineOutput,
    PipelineSource,
    PipelineStage,
)


def tool(**inputs: str) -> PipelineStage:
    arguments = ["{out}", *(f"{{{name}}}" for name in inputs)]
    outputs = {"out": PipelineOutput("out.json", ArtifactKind.report)}
    return PipelineStage(run=StageRun.tool, tool="make_toy.py", arguments=arguments, inputs=inputs, outputs=outputs)


@pytest.fixture
def sound() -> PipelineConfig:
    train = PipelineStage(
        experiment="toy", overrides=["algo.updates=8"], inputs={"model.hf": "base", "data.train": "data.out"}
    )
    evaluation = PipelineStage(run=StageRun.evaluate, inputs={"model.hf": "zero.model", "benchmark.data": "data.out"})
    return PipelineConfig(
        stages={"evaluation": evaluation, "zero": train, "data": tool()},
        sources={"base": PipelineSource()},
        findings={"learns": PipelineFinding("it learns", "evaluation", "pass_at_1", "data")},
    )


def faults_of(pipeline: PipelineConfig) -> list[str]:
    return [str(fault) for fault in check_pipeline(pipeline)]


def test_a_sound_one_has_none_and_an_order(sound) -> None:
    assert faults_of(sound) == []
    assert order(sound) == ["data", "zero", "evaluation"]


def test_stages_that_do_not_wait_for_each_other_keep_their_order(sound) -> None:
    sound.stages = {name: tool() for name in ("z", "b", "y", "a")}
    assert order(sound) == ["z", "b", "y", "a"]


def test_a_circle(sound) -> None:
    sound.stages = {"a": tool(x="b.out"), "b": tool(x="c.out"), "c": tool(x="a.out")}
    sound.findings = {}
    (fault,) = faults_of(sound)
    assert "stages wait for each other" in fault and all(name in fault for name in "abc")
    with pytest.raises(CycleError):
        order(sound)


SPOILED = {
    "no source has this name": lambda p: p.stages["zero"].inputs.update({"model.hf": "bass"}),
    "no stage has this name": lambda p: p.stages["zero"].inputs.update({"data.train": "datum.out"}),
    "stage data leaves out": lambda p: p.stages["zero"].inputs.update({"data.train": "data.rows"}),
    "is no field that takes a file": lambda p: p.stages["zero"].inputs.update({"data.trian": "data.out"}),
    "nothing reads it: no {rows} in overrides": lambda p: p.stages["zero"].inputs.update({"rows": "data.out"}),
    "must be an option of conf/experiment": lambda p: setattr(p.stages["zero"], "experiment", "toyy"),
    "is set by the pipeline for every stage": lambda p: p.stages["zero"].overrides.append("run.seed=4"),
    "is an input": lambda p: p.stages["zero"].overrides.append("model.hf=elsewhere"),
    "no input or output is called nobody": lambda p: p.stages["data"].arguments.append("{nobody}"),
    "must lie inside the stage's directory": lambda p: setattr(p.stages["data"].outputs["out"], "path", "../x"),
    "is the pipeline's own file": lambda p: setattr(p.stages["data"].outputs["out"], "path", "manifest.json"),
    "is at the same place": lambda p: p.stages["data"].outputs.update({"in_it": PipelineOutput("out.json/x")}),
    "a tool stage runs a program": lambda p: setattr(p.stages["data"], "tool", None),
    "run=train is no program": lambda p: setattr(p.stages["zero"], "arguments", ["x"]),
    "must be lower case letters": lambda p: p.stages.update({"Zero": tool()}),
    "is the name of a source too": lambda p: p.stages.update({"base": tool()}),
    "must be > 0": lambda p: setattr(p.stages["data"], "minutes", 0.0),
    "pipeline.findings.learns.baseline": lambda p: setattr(p.findings["learns"], "baseline", "nobody"),
    "must be a stage: evaluation, zero, data": lambda p: setattr(p, "only", "one"),
    "must be different numbers": lambda p: setattr(p, "seeds", [1, 1]),
    "only one of these at a time": lambda p: [setattr(p, "plan", True), setattr(p, "submit", True)],
}


@pytest.mark.parametrize("words", SPOILED)
def test_each_fault_is_told(sound, words) -> None:
    SPOILED[words](sound)
    assert any(words in fault for fault in faults_of(sound)), faults_of(sound)


def test_all_are_told_together(sound) -> None:
    for words in ("no source has this name", "stage data leaves out", "must be > 0"):
        SPOILED[words](sound)
    assert len(faults_of(sound)) == 3
