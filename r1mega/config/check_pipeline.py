"""Rules of a pipeline's stages: what they are called, what they read and write, in which order they can run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.config.faults import Fault
from r1mega.config.registry import fields, options
from r1mega.config.schema_pipeline import PipelineConfig, PipelineOutput, PipelineStage

PLACE = re.compile(r"\{(\w+)\}")  # of a path, in arguments and overrides
GIVEN = ("seed", "dir")  # places that are there without an input or output of their name
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# What the pipeline itself writes into a stage's directory, or sets for every stage.
_RESERVED_FILES = ("manifest.json", "stage.log")
_RESERVED_FIELDS = ("run.dir", "run.seed", "run.resume", "run.resume_from", "run.allow_changes", "pipeline")


def outputs_of(stage: PipelineStage) -> Mapping[str, PipelineOutput]:
    """What the stage leaves: as written, or what every run of its kind leaves."""
    if stage.outputs or stage.run is StageRun.tool:
        return stage.outputs
    if stage.run is StageRun.evaluate:
        return {"report": PipelineOutput("report.json", ArtifactKind.report)}
    return {"model": PipelineOutput("hf", ArtifactKind.checkpoint)}


def stage_before(reference: str) -> str | None:
    """The stage that a reference `STAGE.OUTPUT` names; None for a source."""
    return reference.partition(".")[0] if "." in reference else None


def order(pipeline: PipelineConfig) -> list[str]:
    """The stages, each after those whose outputs it reads, and else as they are written.

    Raises CycleError where there is no such order.
    """
    after = {
        name: [before for reference in stage.inputs.values() if (before := stage_before(reference)) in pipeline.stages]
        for name, stage in pipeline.stages.items()
    }
    TopologicalSorter(after).prepare()
    done: list[str] = []
    while len(done) < len(after):  # the first as written that can run: TopologicalSorter would mix levels
        done.append(next(name for name in after if name not in done and set(after[name]) <= set(done)))
    return done


def check_pipeline(pipeline: PipelineConfig) -> Iterator[Fault]:
    """All faults that the section has by itself; whether its files are there is asked when it runs."""
    for name in (*pipeline.stages, *pipeline.sources):
        if not _NAME.fullmatch(name):
            constraint = "must be lower case letters, digits and underscores, a letter first"
            yield Fault("pipeline", name, constraint, "rename it")
    for name in pipeline.stages.keys() & pipeline.sources.keys():
        yield Fault(f"pipeline.stages.{name}", name, "is the name of a source too", "rename one of them")
    for name, stage in pipeline.stages.items():
        yield from _check_stage(pipeline, name, stage)
    try:
        order(pipeline)
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        yield Fault("pipeline.stages", circle, "stages wait for each other", "take one of these inputs away")
    yield from _check_findings(pipeline)
    if pipeline.only is not None and pipeline.only not in pipeline.stages:
        known = ", ".join(pipeline.stages) or "none"
        yield Fault("pipeline.only", pipeline.only, f"must be a stage: {known}", "correct the name")
    if len(set(pipeline.seeds)) < len(pipeline.seeds) or any(seed < 0 for seed in pipeline.seeds):
        constraint = "must be different numbers of at least 0"
        yield Fault("pipeline.seeds", str(list(pipeline.seeds)), constraint, "correct the list")
    ways = [way for way in ("status", "plan", "submit") if getattr(pipeline, way)]
    if len(ways) > 1:
        yield Fault("pipeline", " and ".join(ways), "only one of these at a time", "set one of them")


def _check_stage(pipeline: PipelineConfig, name: str, stage: PipelineStage) -> Iterator[Fault]:
    at = f"pipeline.stages.{name}"
    yield from _check_kind(at, stage)
    if stage.minutes is not None and stage.minutes <= 0:
        yield Fault(f"{at}.minutes", str(stage.minutes), "must be > 0", "raise it")
    for key, reference in stage.inputs.items():
        yield from _check_reference(pipeline, f"{at}.inputs.{key}", reference)
    yield from _check_input_names(at, stage)
    yield from _check_outputs(at, stage)
    yield from _check_places(at, stage)


def _check_kind(at: str, stage: PipelineStage) -> Iterator[Fault]:
    if stage.run is StageRun.tool:
        if not stage.tool:
            yield Fault(f"{at}.tool", "nothing", "a tool stage runs a program", "name one of tools/")
        for name in ("experiment", "overrides"):
            if value := getattr(stage, name):
                yield Fault(f"{at}.{name}", str(value), "a tool stage has arguments instead", "take it out")
        if not stage.outputs:
            yield Fault(f"{at}.outputs", "none", "a tool stage says what it leaves", "name its outputs")
        return
    for name in ("tool", "arguments"):
        if value := getattr(stage, name):
            yield Fault(f"{at}.{name}", str(value), f"run={stage.run} is no program", "set run: tool, or take it out")
    known = options()["experiment"]
    if stage.experiment is not None and stage.experiment not in known:
        constraint = f"must be an option of conf/experiment: {', '.join(known)}"
        yield Fault(f"{at}.experiment", stage.experiment, constraint, "correct the name")
    for override in stage.overrides:
        field = override.lstrip("+~").partition("=")[0]
        if field in (*_RESERVED_FIELDS, *stage.inputs) or field.startswith("pipeline."):
            constraint = "is an input" if field in stage.inputs else "is set by the pipeline for every stage"
            yield Fault(f"{at}.overrides", override, constraint, "take it out")


def _check_reference(pipeline: PipelineConfig, at: str, reference: str) -> Iterator[Fault]:
    before = stage_before(reference)
    if before is None:
        if reference not in pipeline.sources:
            known = ", ".join(pipeline.sources) or "none"
            yield Fault(at, reference, f"no source has this name; there are: {known}", "name STAGE.OUTPUT or a source")
        return
    if before not in pipeline.stages:
        known = ", ".join(pipeline.stages)
        yield Fault(at, reference, f"no stage has this name; there are: {known}", "name STAGE.OUTPUT or a source")
        return
    outputs = outputs_of(pipeline.stages[before])
    if reference.partition(".")[2] not in outputs:
        yield Fault(at, reference, f"stage {before} leaves {', '.join(outputs) or 'nothing'}", "name one of these")


def _check_input_names(at: str, stage: PipelineStage) -> Iterator[Fault]:
    known = {field.path for field in fields()}
    texts = " ".join((*stage.arguments, *stage.overrides))
    for key in stage.inputs:
        if "." in key:
            if stage.run is StageRun.tool:
                constraint = "a tool has no configuration"
                yield Fault(f"{at}.inputs", key, constraint, "give it a name, and write {NAME} in arguments")
            elif key not in known or key in _RESERVED_FIELDS:
                yield Fault(f"{at}.inputs", key, "is no field that takes a file", "see r1mega train --help")
        elif key in GIVEN or key in outputs_of(stage):
            yield Fault(f"{at}.inputs", key, "is the name of something else of this stage", "rename it")
        elif "{" + key + "}" not in texts:
            where = "arguments" if stage.run is StageRun.tool else "overrides"
            yield Fault(f"{at}.inputs", key, f"nothing reads it: no {{{key}}} in {where}", "write it there")


def _check_outputs(at: str, stage: PipelineStage) -> Iterator[Fault]:
    seen: dict[PurePosixPath, str] = {}
    for name, output in outputs_of(stage).items():
        path = PurePosixPath(output.path)
        here = f"{at}.outputs.{name}.path"
        if name in GIVEN or not re.fullmatch(r"\w+", name):
            yield Fault(f"{at}.outputs", name, "is no name of an output", "rename it")
        if not output.path or path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
            constraint = "must lie inside the stage's directory"
            yield Fault(here, output.path or "nothing", constraint, "write a path relative to it")
        elif output.path in _RESERVED_FILES:
            yield Fault(here, output.path, "is the pipeline's own file", "choose another one")
        for other, owner in seen.items():
            if path == other or path in other.parents or other in path.parents:
                yield Fault(here, output.path, f"output {owner} is at the same place", "choose another one")
        seen[path] = name


def _check_places(at: str, stage: PipelineStage) -> Iterator[Fault]:
    known = {*GIVEN, *stage.inputs, *outputs_of(stage)}
    for name in ("arguments", "overrides"):
        for text in getattr(stage, name):
            for place in PLACE.findall(text):
                if place not in known:
                    constraint = f"no input or output is called {place}"
                    yield Fault(f"{at}.{name}", text, constraint, f"name one, or one of {', '.join(GIVEN)}")


def _check_findings(pipeline: PipelineConfig) -> Iterator[Fault]:
    for name, finding in pipeline.findings.items():
        at = f"pipeline.findings.{name}"
        for field in ("stage", "baseline"):
            stage = getattr(finding, field)
            if stage not in pipeline.stages:
                yield Fault(f"{at}.{field}", stage or "nothing", "must be a stage", "name one of pipeline.stages")
        if not finding.claim:
            yield Fault(f"{at}.claim", "nothing", "a finding says what it claims", "write it in words")
