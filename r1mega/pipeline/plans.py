"""What every stage of a pipeline would take, as `r1mega plan` works it out, in one table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import ASCII
from rich.console import Console
from rich.table import Table

from r1mega.config.choices import StageRun
from r1mega.config.faults import ConfigError, Fault
from r1mega.launch import preflight
from r1mega.pipeline import faults
from r1mega.pipeline.stage import Stage
from r1mega.plan.job import GIB
from r1mega.plan.run import DOES_NOT_FIT, FITS, work_out


@dataclass(frozen=True)
class StagePlan:
    """One stage: accelerators, seconds and GiB of a device at the worst instant. `misfits` says why it does not fit,
    `faults` why it cannot be; a tool takes nothing that is planned."""

    name: str
    gpus: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    phase: str = ""
    limit: float = 0.0
    misfits: Sequence[str] = ()
    faults: Sequence[Fault | str] = ()

    @property
    def hours(self) -> float:
        """Of all accelerators together."""
        return self.gpus * self.seconds / 3600


def show(stages: Mapping[str, Stage]) -> int:
    """Plan every stage and print the table: 0 where all fit, 1 where one does not. Raises ConfigError with every reason
    of every stage that cannot be."""
    found = []
    for number, stage in enumerate(stages.values(), start=1):
        print(f"r1mega pipeline: planning {number} of {len(stages)}: {stage.name}", file=sys.stderr, flush=True)
        found.append(of_stage(stage))
    wrong = [f"stage {one.name}: {fault}" for one in found for fault in one.faults]
    if wrong:
        raise ConfigError(wrong)
    console = Console(width=120 if not sys.stdout.isatty() else None, highlight=False)
    console.print(table(stages, found))
    for one in found:
        for line in one.misfits:
            console.print(f"{one.name} does not fit: {line}")
    hours = sum(one.hours for one in found)
    planned = sum(stage.spec.run is not StageRun.tool for stage in stages.values())
    fit = sum(not one.misfits for one in found if one.gpus)
    console.print(f"{fit} of {planned} planned stages fit; {hours:,.0f} accelerator hours in all")
    return FITS if not any(one.misfits for one in found) else DOES_NOT_FIT


def of_stage(stage: Stage) -> StagePlan:
    """What one stage would take; its inputs need not be there."""
    wrong = list(faults.of_stage(stage))
    if wrong or stage.spec.run is StageRun.tool:
        return StagePlan(stage.name, faults=wrong)
    try:
        config = stage.config()
        found, _ = work_out(config, preflight.find(config, here=False))
    except ConfigError as error:
        return StagePlan(stage.name, faults=error.faults)
    _, phase, peak = found.worst()
    return StagePlan(
        name=stage.name,
        gpus=found.num_gpus,
        seconds=found.seconds_per_update * found.job.updates,
        peak=peak / GIB,
        phase=phase,
        limit=config.cluster.gpu_memory_gib,
        misfits=tuple(found.misfits),
    )


def table(stages: Mapping[str, Stage], found: Sequence[StagePlan]) -> Table:
    """One line a stage."""
    made = Table(box=ASCII, title="what each stage would take, from the efficiencies of the plan section")
    for name in ("stage", "runs", "fits", "GPUs", "GiB", "fullest in", "seconds", "days", "GPU hours"):
        made.add_column(name, justify="left" if name in ("stage", "runs", "fits", "fullest in") else "right")
    for one in found:
        spec = stages[one.name].spec
        runs = f"{spec.run} {spec.experiment or spec.tool or ''}".strip()
        if not one.gpus:
            made.add_row(one.name, runs, "-", "-", "-", "-", "-", "-", "-")
            continue
        made.add_row(
            one.name,
            runs,
            "no" if one.misfits else "yes",
            f"{one.gpus:,}",
            f"{one.peak:.1f} of {one.limit:g}",
            one.phase,
            f"{one.seconds:,.0f}",
            f"{one.seconds / 86400:.1f}",
            f"{one.hours:,.0f}",
        )
    return made
