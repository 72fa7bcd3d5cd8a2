"""A pipeline as Slurm jobs: one for each stage, which waits for those whose outputs it reads.

Every job runs `r1mega pipeline ... pipeline.only=STAGE` on its first machine. What it then does is what a pipeline does
everywhere: it compares keys, goes on or begins, and writes the stage's manifest, so a job that is queued again, or one
with nothing left to do, needs no rules of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config import io
from r1mega.config.check_slurm import check_submit
from r1mega.config.choices import SAMPLING_LOOPS, Scheduler, StageRun
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import preflight, rundir, slurm, submit
from r1mega.loop.stop import STOPPED
from r1mega.pipeline import judge
from r1mega.pipeline.child import Signals
from r1mega.pipeline.digest import Digests
from r1mega.pipeline.files import read_json, write_json
from r1mega.pipeline.judge import Need
from r1mega.pipeline.runner import Walk
from r1mega.pipeline.stage import Stage, assign

if TYPE_CHECKING:
    from r1mega.pipeline.run import Asked

FOLDER, JOBS_FILE = "jobs", "jobs.json"
_SECONDS = 60.0  # for a busy slurmctld


def run(config: Config, stages: Mapping[str, Stage], asked: Asked) -> int:
    """Queue the stages that are not done, or print the chain as a script; returns 0, or sbatch's exit code.

    Raises ConfigError with every fault of every job before one is queued.
    """
    root = Path(config.run.dir).absolute()
    digests = Digests(root)
    walk = Walk(stages, config.pipeline, digests, Signals())
    walk.look()
    left = {name: stage for name, stage in stages.items() if walk.verdicts[name].need is not Need.nothing}
    if config.pipeline.only is not None:
        left = {name: stage for name, stage in left.items() if name == config.pipeline.only}
    configs = {name: _job_config(stage) for name, stage in left.items()}
    wrong = [f"stage {name}: {fault}" for name, made in configs.items() for fault in _faults(left[name], made)]
    if config.pipeline.seeds[1:]:
        constraint = "jobs are queued for one seed at a time"
        wrong.append(str(Fault("pipeline.seeds", str(list(config.pipeline.seeds)), constraint, "name one")))
    if not asked.dry_run:
        wrong += _faults_of_now(root)
    if wrong:
        raise ConfigError(wrong)
    if asked.dry_run:
        print(script(left, configs, root, asked), end="")
        return 0
    judge.require_sources(left, config.pipeline)
    return _submit(left, configs, root, asked)


def script(left: Mapping[str, Stage], configs: Mapping[str, Config], root: Path, asked: Asked) -> str:
    """The whole chain as a shell script that would queue it; nothing is written."""
    lines = ["#!/bin/bash", f"# {len(left)} jobs; each waits for those whose outputs it reads.", "set -euo pipefail"]
    for number, (name, stage) in enumerate(left.items(), start=1):
        waits = [f"${{job_{before}}}" for before in stage.before if before in left]
        words = ["sbatch", "--parsable", *_dependency(waits)]
        what = stage.spec.experiment or stage.spec.tool or ""
        lines += ["", f"# {number} of {len(left)}: {name} ({stage.spec.run} {what}): {stage.spec.about}".rstrip()]
        lines += [
            f"job_{name}=$({' '.join(words)} <<'R1MEGA_JOB'",
            _script_of(stage, configs[name], root, asked).rstrip(),
        ]
        lines += ["R1MEGA_JOB", ")"]
    return "\n".join(lines) + "\n"


def _dependency(jobs: Sequence[str]) -> list[str]:
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []


def _script_of(stage: Stage, config: Config, root: Path, asked: Asked) -> str:
    python = config.slurm.python or sys.executable
    again = [argument for argument in asked.arguments if not argument.startswith(("pipeline.submit", "pipeline.only"))]
    command = [python, "-m", "r1mega.cli", "pipeline", *again, f"pipeline.only={stage.name}"]
    return submit.render(config, root / FOLDER / f"{stage.name}.yaml", command)


def _job_config(stage: Stage) -> Config:
    """What the job's script is made of: the stage's own configuration, or of a tool that of one process."""
    if stage.spec.run is StageRun.tool:
        one = ["cluster.scheduler=slurm", "cluster.nodes=1", "slurm.exclusive=false", "slurm.health_check=false"]
        made = stage.compose([*stage.shared, *one, "device=cpu", "parallel=single", assign("run.dir", str(stage.dir))])
    else:
        made = stage.config()
    made.run.name = stage.name
    if stage.spec.run is StageRun.tool or made.stage.loop in SAMPLING_LOOPS:
        # One task on each machine, which servers are started from: their engines do all the work.
        made.parallel = replace(made.parallel, tp=1, pp=1, cp=1, ep=1, dp=made.cluster.nodes)
    return made


def _faults(stage: Stage, config: Config) -> Iterator[Fault]:
    found = check_submit(config)
    if stage.spec.run is StageRun.tool or config.stage.loop in SAMPLING_LOOPS:
        # They write no checkpoints, go on from what they have, and have no layout that could fail to fill the job.
        return (fault for fault in found if fault.field in ("cluster.scheduler", "run.dir"))
    return found


def _faults_of_now(root: Path) -> list[str]:
    """What speaks against queueing these jobs here and now."""
    faults = []
    if shutil.which("sbatch") is None:
        constraint = "is no program of this machine"
        faults.append(str(Fault("pipeline.submit", "sbatch", constraint, "submit where Slurm is, or add --dry-run")))
    queued = read_json(root / FOLDER / JOBS_FILE) or {}
    for name, job in queued.items() if shutil.which("squeue") else ():
        state = slurm.job_state(job)
        if state is not None:
            fault = Fault("run.dir", str(root), f"job {job} of stage {name} is {state}", f"wait, or scancel {job}")
            faults.append(str(fault))
    return faults


def _submit(left: Mapping[str, Stage], configs: Mapping[str, Config], root: Path, asked: Asked) -> int:
    folder = root / FOLDER
    (folder / rundir.LOG_DIR).mkdir(parents=True, exist_ok=True)
    queued: dict[str, str] = {}
    for name, stage in left.items():
        (folder / f"{name}.yaml").write_text(io.to_yaml(configs[name]), encoding="utf-8")
        path = folder / f"{name}.sbatch"
        path.write_text(_script_of(stage, configs[name], root, asked), encoding="utf-8")
        waits = [queued[before] for before in stage.before if before in queued]
        words = ["sbatch", "--parsable", *_dependency(waits), str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            print(f"r1mega: sbatch has not taken stage {name}: {done.stderr.strip()}", file=sys.stderr)
            if queued:
                print(f"r1mega: queued before it: {', '.join(queued.values())}", file=sys.stderr)
            return done.returncode
        queued[name] = done.stdout.strip().partition(";")[0]
        write_json(folder / JOBS_FILE, queued)
        after = f" after {' '.join(waits)}" if waits else ""
        print(f"job {queued[name]}: {name}{after}", flush=True)
    print(f"output of the jobs: {folder / rundir.LOG_DIR}; state: pipeline.status=true")
    return 0


def in_job(stage: Stage, resume: bool) -> list[str]:
    """The command of a stage inside its job, or outside of any where it does not ask for one.

    Raises ConfigError where the stage asks for machines of Slurm and this is none of its jobs.
    """
    if stage.spec.run is StageRun.tool:
        return stage.command(resume=resume)
    config = stage.config()
    if config.cluster.scheduler is not Scheduler.slurm:
        return stage.command(resume=resume)
    if "SLURM_JOB_ID" not in os.environ:
        constraint = f"stage {stage.name} is to be a job"
        remedy = "queue it with pipeline.submit=true, or give it cluster=local"
        raise ConfigError([Fault("cluster.scheduler", "slurm", constraint, remedy)])
    if config.stage.loop in SAMPLING_LOOPS:
        return stage.command(resume=resume, more=_servers(config))
    config.run.resume = resume
    preflight.require(config)
    return [sys.executable, "-m", "r1mega.launch.slurm_job", "--config", str(rundir.create(config).absolute())]


def _servers(config: Config) -> list[str]:
    """Overrides that give an evaluation's servers the machines of the job."""
    from r1mega.launch.slurm_job import place_engines

    place_engines(config, slurm.Job.of(os.environ).nodes)
    sglang = config.sglang
    if not sglang.hosts:
        return ["cluster.scheduler=local"]
    hosts = ",".join(sglang.hosts)
    words = ["cluster.scheduler=local", f"sglang.hosts=[{hosts}]", assign("sglang.remote", sglang.remote or "")]
    return [*words, assign("sglang.weights_dir", sglang.weights_dir or "")]


def conclude(stage: Stage, code: int) -> None:
    """Queue the job again that its time limit has ended, where nobody else does: a training's own controller does."""
    job = os.environ.get("SLURM_JOB_ID")
    if code != STOPPED or job is None:
        return
    config = _job_config(stage)
    is_training = stage.spec.run is StageRun.train and config.stage.loop not in SAMPLING_LOOPS
    if is_training or config.cluster.scheduler is not Scheduler.slurm:
        return
    refused = slurm.requeue(job) if config.slurm.requeue else "slurm.requeue=false"
    told = "the job is queued again" if refused is None else f"the job is not queued again: {refused}"
    print(f"r1mega: stage {stage.name} was asked to stop; {told}", file=sys.stderr, flush=True)
