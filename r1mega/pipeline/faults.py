"""What is wrong with a pipeline before a stage of it has run: every fault of every stage's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from r1mega.config.check import value_at
from r1mega.config.choices import StageRun
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.pipeline.stage import FILE_FIELDS, Stage


def find(stages: Mapping[str, Stage]) -> list[str]:
    """Every fault of these stages, with the stage's name; nothing is asked of their inputs, which may come later."""
    return [f"stage {stage.name}: {fault}" for stage in stages.values() for fault in of_stage(stage)]


def of_stage(stage: Stage) -> Iterator[Fault | str]:
    """Every fault of one stage's configuration, or of its program."""
    if stage.spec.run is StageRun.tool:
        if not stage.program.is_file():
            yield Fault("tool", str(stage.program), "is no file", "name a program of tools/, or a path with a slash")
        return
    try:
        config = stage.general_config
    except ConfigError as error:
        yield from error.faults
        return
    from r1mega.launch import preflight  # seconds of imports that a pipeline of tools, or a look at it, does without

    yield from _undeclared(stage, config)
    yield from preflight.find(config, here=False)


def _undeclared(stage: Stage, config: Config) -> Iterator[Fault]:
    """Files that the configuration names and the stage does not call its inputs: nobody would know of a change."""
    wanted = ["model.hf", "benchmark.data" if stage.spec.run is StageRun.evaluate else "data.train"]
    written = " ".join((*stage.shared, *stage.spec.overrides))
    for field in FILE_FIELDS:
        value = value_at(config, field)
        if field in stage.paths or "{" in written and f"{field}=" in written:
            continue
        if value or field in wanted:
            constraint = "is a file that the stage reads, and not among its inputs"
            remedy = f"write it there ({field}: SOURCE or STAGE.OUTPUT), or set {field}=null in its overrides"
            if isinstance(value, list):
                remedy = f"write each there under a NAME and {field}=[{{NAME}}] in its overrides, or set {field}=[]"
            yield Fault(field, str(value or "nothing"), constraint, remedy)
