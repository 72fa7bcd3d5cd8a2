"""What srun starts for each rank: sets what torch looks for, runs the training process, and reports how it ended.

It takes SIGTERM, which Slurm sends to the tasks of a job that is preempted, and SIGUSR1 for the training process, and
asks the run to stop. The process itself is deaf to both: it ends by itself, after the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from r1mega.launch.rank_processes import die_with_parent
from r1mega.loop import stop

STARTED, ENDED = "rank{}.started", "rank{}.ended"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> int:
    """Run the command after `--` as one rank; its exit code, or 128 + the signal that killed it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where ranks report")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run that signals ask to stop")
    parser.add_argument("--per-node", type=int, required=True, help="ranks of each machine")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    numbers = rank_env(os.environ, args.per_node)
    rank = numbers["RANK"]

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.ask(args.run_dir, f"{signal.Signals(number).name} to rank {rank}")

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    node = os.environ.get("SLURMD_NODENAME", "?")
    _report(args.folder / STARTED.format(rank), node)
    process = subprocess.Popen(args.command, env={**os.environ, **numbers}, preexec_fn=_deaf_child(os.getpid()))
    status = process.wait()
    _report(args.folder / ENDED.format(rank), str(status))
    return status if status >= 0 else 128 - status


def rank_env(environ: Mapping[str, str], per_node: int) -> dict[str, str]:
    """torch's numbers of a rank, from Slurm's of a task."""
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(per_node),
    }


def _report(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _deaf_child(parent: int) -> Callable[[], None]:
    """For Popen: the child and all it starts ignore the signals, and it does not outlive this process."""
    bind = die_with_parent(parent) if sys.platform == "linux" else None

    def prepare() -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if bind is not None:
            bind()

    return prepare


if __name__ == "__main__":
    sys.exit(main())
