"""Fields of a pipeline, the stages of a recipe as one run: see schema.py, and docs/pipeline.md for the format."""

from __future__ import annotations

from dataclasses import dataclass, field

from r1mega.config.choices import ArtifactKind, Direction, StageRun


@dataclass
class PipelineSource:
    """What no stage makes."""

    path: str | None = None
    """File or directory; null: to be given, pipeline.sources.NAME.path=PATH."""
    kind: ArtifactKind = ArtifactKind.prompts
    """What it is."""
    about: str = ""
    """One line for people."""


@dataclass
class PipelineOutput:
    """What a stage leaves for others."""

    path: str = ""
    """File or directory, inside the stage's run directory."""
    kind: ArtifactKind = ArtifactKind.report
    """What it is."""


@dataclass
class PipelineStage:
    """One stage: a run of r1mega, or a program of tools/."""

    about: str = ""
    """One line for people."""
    run: StageRun = StageRun.train
    """`train` (r1mega train), `evaluate` (r1mega evaluate) or `tool` (a program of tools/)."""
    experiment: str | None = None
    """Option of conf/experiment that a `train` or `evaluate` stage is; null: all by overrides."""
    overrides: list[str] = field(default_factory=list)
    """Further overrides of such a stage, as on the command line; {NAME} is the path of an input or output."""
    tool: str | None = None
    """Program of a `tool` stage: a file of tools/, or a path with a slash in it."""
    arguments: list[str] = field(default_factory=list)
    """Its arguments; {NAME} is the path of an input or output, {seed} the seed, {dir} the stage's directory."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Config field, or a name for {NAME} -> `STAGE.OUTPUT`, or a source's name."""
    outputs: dict[str, PipelineOutput] = field(default_factory=dict)
    """What it leaves. Empty: `model`, the checkpoint hf, of a training; `report`, report.json, of an evaluation."""
    minutes: float | None = None
    """The stage is ended after so long; null: never by the pipeline. A Slurm job has slurm.time_limit besides."""


@dataclass
class PipelineFinding:
    """A claim: the metric of one stage against that of another."""

    claim: str = ""
    """The claim in words."""
    stage: str = ""
    """Stage whose metric is compared."""
    metric: str = "pass_at_1"
    """Its metric: of metrics.jsonl the last value, of an evaluation pass_at_1 and so on, of a tool as its report has
    it."""
    baseline: str = ""
    """Stage it is compared with."""
    baseline_metric: str | None = None
    """That one's metric; null: the same."""
    direction: Direction = Direction.higher
    """Whether the claim is that the metric is `higher` or `lower` than the baseline's."""
    margin: float = 0.0
    """By how much at least; below 0 the claim is that it is worse by less than this."""
    note: str = ""
    """What has to be said with it."""


@dataclass
class PipelineConfig:
    title: str = ""
    """Title of the report."""
    stages: dict[str, PipelineStage] = field(default_factory=dict)
    """The stages by name, of lower case letters, digits and underscores."""
    sources: dict[str, PipelineSource] = field(default_factory=dict)
    """Artifacts that no stage makes, by name."""
    findings: dict[str, PipelineFinding] = field(default_factory=dict)
    """What report.json compares, by name."""
    seeds: list[int] = field(default_factory=list)
    """Seeds to run all stages with, one after the other; empty: run.seed alone. The first one's stages lie in
    run.dir/stages, those of another one N in run.dir/seeds/N/stages."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of all `train` and `evaluate` stages, before a stage's own."""
    at_once: int = 1
    """Stages that run at a time on this machine; each takes the devices and ports that its configuration names. As
    Slurm jobs all run at once whose inputs are there."""
    only: str | None = None
    """Run this stage alone, whose inputs have to be there."""
    status: bool = False
    """Say of each stage whether it is done, and run nothing."""
    plan: bool = False
    """Plan each stage as `r1mega plan` does, and print one table."""
    submit: bool = False
    """Queue each stage as a Slurm job that waits for those whose outputs it reads."""
