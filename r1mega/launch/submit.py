"""`r1mega submit`: a run as one Slurm job. It is checked as by `train`, and its script made and queued.

The job goes on in r1mega.launch.slurm_job, on the first of its machines.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from r1mega.config.check_slurm import check_submit, ranks_per_node
from r1mega.config.choices import DeviceType
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import preflight, resume, rundir, slurm

SCRIPT, JOB_FILE = "job.sbatch", "job"
_SECONDS = 60.0  # for a busy slurmctld
_PLACE = re.compile(r"@(?P<name>[a-z_]+)@")  # in the template; $ is the shell's


def run(config: Config, *, dry_run: bool = False) -> int:
    """Queue `config` and print the job's number; with `dry_run` print the script and change nothing.

    Returns 0, or sbatch's exit code, of which nothing is left behind. Raises ConfigError where there are faults.
    """
    also = list(check_submit(config))
    if not dry_run and shutil.which("sbatch") is None:
        constraint = "is no program of this machine"
        also.append(Fault("cluster.scheduler", "sbatch", constraint, "submit where Slurm is, or add --dry-run"))
    preflight.require(config, also=also)
    resume.find(config)
    _require_idle(Path(config.run.dir))
    if dry_run:
        print(render(config, Path(config.run.dir).absolute() / "config.yaml"), end="")
        return 0
    return _submit(config)


def _submit(config: Config) -> int:
    config_path = rundir.create(config).absolute()
    folder = config_path.parent / slurm.FOLDER
    folder.mkdir(exist_ok=True)
    script = folder / SCRIPT
    script.write_text(render(config, config_path), encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        print(f"r1mega: sbatch has not taken the job: {done.stderr.strip()}", file=sys.stderr)
        script.unlink()
        config_path.unlink()
        for made in (folder, config_path.parent / rundir.LOG_DIR, config_path.parent):
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
        return done.returncode
    job = done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER where there are several clusters
    (folder / JOB_FILE).write_text(job + "\n", encoding="utf-8")
    print(f"job {job}: {config.run.dir}; its output: {_output(config_path.parent).replace('%j', job)}")
    return 0


def _require_idle(run_dir: Path) -> None:
    """Raises ConfigError where the job that runs in this directory has not ended."""
    path = run_dir / slurm.FOLDER / JOB_FILE
    if not path.exists() or shutil.which("squeue") is None:
        return
    job = path.read_text(encoding="utf-8").strip()
    state = slurm.job_state(job)
    if state is not None:
        constraint = f"job {job} of this run is {state}"
        raise ConfigError([Fault("run.dir", str(run_dir), constraint, f"wait for it, or end it: scancel {job}")])


def render(config: Config, config_path: Path, command: Sequence[str] | None = None) -> str:
    """The script of the job, whose run directory is that of `config_path` (absolute). It ends in `command`, by default
    the controller of a run on the job's machines."""
    settings, run_dir = config.slurm, config_path.parent
    folder = slurm.templates()
    values = {
        "config": str(config_path),
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(config, run_dir)),
        "setup": "\n".join(settings.setup) or ": # no slurm.setup",
        "slurm_dir": str(folder),
        "exports": _exports(config),
        "requeue": 'scontrol requeue "$SLURM_JOB_ID";' if settings.requeue else "",
        "health_check": _health_check(config, run_dir) if settings.health_check else ": # slurm.health_check=false",
        "command": shlex.join(command) if command else _controller(config, config_path),
    }
    template = (folder / SCRIPT).read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: values[place["name"]], template)


def _controller(config: Config, config_path: Path) -> str:
    return f'"{config.slurm.python or sys.executable}" -m r1mega.launch.slurm_job --config "{config_path}"'


def _output(run_dir: Path) -> str:
    return str(run_dir / rundir.LOG_DIR / "slurm-%j.out")


def _directives(config: Config, run_dir: Path) -> list[str]:
    settings, cluster = config.slurm, config.cluster
    lines = [f"--job-name={config.run.name.replace(' ', '-')}", f"--nodes={cluster.nodes}"]
    lines.append(f"--ntasks-per-node={ranks_per_node(config)}")
    for name in ("partition", "account", "qos"):
        if value := getattr(settings, name):
            lines.append(f"--{name}={value}")
    if settings.time_limit:
        lines.append(f"--time={settings.time_limit}")
    if settings.cpus_per_task:
        lines.append(f"--cpus-per-task={settings.cpus_per_task}")
    if config.device.type is DeviceType.cuda:
        lines.append(settings.gpu_request.replace("{count}", str(cluster.gpus_per_node)))
    if settings.exclusive:
        lines += ["--exclusive", "--mem=0"]
    # B: the controller alone is told; it asks the ranks, and servers go on answering.
    lines.append(f"--signal=B:USR1@{settings.signal_seconds}")
    lines.append("--requeue" if settings.requeue else "--no-requeue")
    lines += [f"--output={_output(run_dir)}", "--open-mode=append", f"--chdir={os.getcwd()}"]
    return lines + list(settings.extra)


def _exports(config: Config) -> str:
    """What env.sh cannot know."""
    interface = config.slurm.network_interface
    if interface is None:
        return ": # no slurm.network_interface"
    return "\n".join(f"export {name}={shlex.quote(interface)}" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))


def _health_check(config: Config, run_dir: Path) -> str:
    """The step that looks at every machine; the job ends with it where one has a fault."""
    cluster, uses_gpus = config.cluster, config.device.type is DeviceType.cuda
    words = ["srun", "--overlap", f"--nodes={cluster.nodes}", f"--ntasks={cluster.nodes}", "--ntasks-per-node=1"]
    words += ["--kill-on-bad-exit=0", "bash", str(slurm.templates() / "health_check.sh")]
    words += ["--gpus", str(cluster.gpus_per_node if uses_gpus else 0), "--gpu-memory", f"{cluster.gpu_memory_gib:g}"]
    words += ["--disk", str(run_dir), "--min-disk", f"{config.slurm.min_disk_gib:g}"]
    return shlex.join(words) + ' --epoch "$(date +%s)"'
