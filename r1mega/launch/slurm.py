"""What is asked of Slurm: its commands, and what they answer."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = "slurm"  # in a run directory: the script, the job's number, and a folder for each start
_SECONDS = 60.0
_PROBES_AT_ONCE = 32


def templates() -> Path:
    """The directory of the job's script and what belongs to it: in an installed package, or beside it in a checkout.

    Raises FileNotFoundError where neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "slurm", package.parent / "slurm"):
        if (place / "job.sbatch").is_file():
            return place
    raise FileNotFoundError(f"no script of a Slurm job in {package / 'slurm'}; install r1mega again")


@dataclass(frozen=True)
class Job:
    """The allocation that this process runs in.

    Args:
        restarts: how often it was queued again.
        nodes: its machines, as Slurm names them, the first one being this one.
    """

    id: str
    restarts: int
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Job:
        """From what Slurm sets. Raises ValueError outside a job."""
        try:
            number, names = environ["SLURM_JOB_ID"], environ["SLURM_JOB_NODELIST"]
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is not set: this runs inside a Slurm job; use r1mega submit") from None
        found = ask("scontrol", "show", "hostnames", names).split()
        return cls(number, int(environ.get("SLURM_RESTART_COUNT", "0")), tuple(found))


def ask(*command: str) -> str:
    """What a command of Slurm prints. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def address_of(node: str) -> str:
    """Where Slurm reaches a machine, which need not be its name."""
    found = re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "show", "node", node))
    return found[1] if found else node


def job_state(job: str) -> str | None:
    """RUNNING, PENDING and so on; None where the job has ended or was never there."""
    done = subprocess.run(
        ["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True, timeout=_SECONDS
    )
    return done.stdout.strip() or None  # an unknown number is an error to squeue, and has ended to us


def requeue(job: str) -> str | None:
    """Queue the job again; why not, where that cannot be.

    Only a running one: to requeue a cancelled job would bring back what somebody has ended.
    """
    state = job_state(job)
    if state != "RUNNING":
        return f"it is {state or 'not known any more'}"
    try:
        ask("scontrol", "requeue", job)
    except RuntimeError as error:
        return str(error)
    return None


def lost_nodes(nodes: Sequence[str], seconds: float) -> list[str]:
    """Those of the job's machines that do not start a command in this time, asked all beside each other."""
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        answers = pool.map(lambda node: _starts(node, seconds), nodes)
        return [node for node, starts in zip(nodes, answers, strict=True) if not starts]


def _starts(node: str, seconds: float) -> bool:
    command = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--cpu-bind=none", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False
