"""`r1mega pipeline`: from a configuration to the stages that it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from r1mega.config.check import check_bounds
from r1mega.config.check_pipeline import check_pipeline, order
from r1mega.config.choices import StageRun
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.loop.stop import STOPPED
from r1mega.pipeline import faults, judge, lineage, lock, report
from r1mega.pipeline.child import Signals
from r1mega.pipeline.digest import Digests
from r1mega.pipeline.runner import Walk
from r1mega.pipeline.stage import Compose, Place, Stage, stages_of
from r1mega.pipeline.table import Display

LOCKS = "locks"  # of stages that run alone
# What may be overridden besides the pipeline itself; all else is a matter of its stages.
_OWN = ("pipeline", "run.dir", "run.seed")


@dataclass(frozen=True)
class Asked:
    """What was asked on the command line: `arguments` as written there, the `overrides` among them."""

    overrides: Sequence[str]
    compose: Compose
    arguments: Sequence[str] = ()
    dry_run: bool = False


def run(config: Config, asked: Asked) -> int:
    """Do what is asked with a pipeline and return the exit code: 0, or that of the stage that failed first.

    Raises ConfigError with every fault of every stage, before anything is written or started.
    """
    require(config, asked)
    pipeline, root = config.pipeline, Path(config.run.dir).absolute()
    compose = cache(asked.compose)  # most of a second each, and evaluations of several models are composed alike
    walks = [_stages(config, place, lambda overrides: compose(tuple(overrides))) for place in places(config)]
    first = walks[0]
    if pipeline.plan:
        from r1mega.pipeline import plans

        return plans.show(first)
    wrong = faults.find(first)
    if wrong:
        raise ConfigError(wrong)
    if asked.dry_run or pipeline.submit:
        from r1mega.pipeline import chain

        return chain.run(config, first, asked)
    if pipeline.status:
        return _status(config, walks)
    wanted = first if pipeline.only is None else {pipeline.only: first[pipeline.only]}
    judge.require_sources(wanted, pipeline)
    with ExitStack() as stack:
        # Stages alone, as jobs run them, run beside each other; a whole pipeline has its directory to itself.
        held = [stack.enter_context(lock.held(root, shared=pipeline.only is not None))]
        if pipeline.only is not None:
            held.append(stack.enter_context(lock.held(root / LOCKS / pipeline.only)))
        return _run(config, walks, held)


def _run(config: Config, all_stages: Sequence[dict[str, Stage]], locks: Sequence[int]) -> int:
    pipeline, root = config.pipeline, Path(config.run.dir).absolute()
    digests, signals, display = Digests(root), Signals(), Display()
    walks: list[Walk] = []
    code = 0
    with signals.collected():
        for stages in all_stages:
            if len(all_stages) > 1:
                print(f"seed {next(iter(stages.values())).place.seed}", flush=True)
            walk = Walk(stages, pipeline, digests, signals, display, command=_command, keep_open=locks)
            walks.append(walk)
            with display.open():
                code = walk.run(pipeline.only)
            lineage.write(stages, pipeline, walk.done, digests)
            if code:
                break
    if any(walk.done for walk in walks):
        print(f"wrote {report.write(root, pipeline, walks)}", flush=True)
    if code == STOPPED and pipeline.only is not None:
        from r1mega.pipeline import chain

        chain.conclude(all_stages[0][pipeline.only], code)
    return code


def _command(stage: Stage, resume: bool) -> Sequence[str]:
    if stage.spec.run is StageRun.tool:
        return stage.command(resume=resume)
    from r1mega.pipeline import chain

    return chain.in_job(stage, resume)


def _status(config: Config, all_stages: Sequence[dict[str, Stage]]) -> int:
    """Print what each stage needs; reads artifacts that have changed since they were last looked at."""
    digests, display = Digests(Path(config.run.dir).absolute()), Display()
    for stages in all_stages:
        walk = Walk(stages, config.pipeline, digests, Signals(), elsewhere=_running(config, stages))
        walk.look()
        if len(all_stages) > 1:
            print(f"seed {next(iter(stages.values())).place.seed}")
        display.status(walk)
    return 0


def _running(config: Config, names: Iterable[str]) -> set[str]:
    """Stages that a pipeline, or a job of theirs, has hold of."""
    root = Path(config.run.dir).absolute()
    whole = lock.is_held(root)
    return {name for name in names if whole or lock.is_held(root / LOCKS / name)}


def require(config: Config, asked: Asked) -> None:
    """Raises ConfigError with every fault of the pipeline's own section, and of what was asked besides."""
    pipeline = config.pipeline
    found = [*check_bounds(config, "pipeline."), *check_pipeline(pipeline)]
    if not pipeline.stages:
        found.append(Fault("pipeline", "nothing", "must be chosen", "pipeline=NAME, an option of conf/pipeline"))
    fields = [override.lstrip("+~").partition("=")[0] for override in asked.overrides]
    if "run.dir" not in fields:
        found.append(Fault("run.dir", "nothing", "the pipeline goes on in its directory", "set run.dir=DIR"))
    for override, name in zip(asked.overrides, fields, strict=True):
        if name not in _OWN and not name.startswith("pipeline."):
            remedy = f'pipeline.overrides=["{override}"] gives it to all, pipeline.stages.NAME.overrides to one'
            found.append(Fault(name, override, "is a matter of the stages", remedy))
    if found:
        raise ConfigError(found)


def places(config: Config) -> list[Place]:
    """Where the stages of each seed lie."""
    root, seeds = Path(config.run.dir).absolute(), config.pipeline.seeds or [config.run.seed]
    return [Place(root, seed, number) for number, seed in enumerate(seeds)]


def _stages(config: Config, place: Place, compose: Compose) -> dict[str, Stage]:
    return stages_of(config.pipeline, order(config.pipeline), place, compose)
