"""How long the ranks of one machine take to start, and what they hold: each started for itself, or all from one.

    python -m benchmarks.start [--ranks 4 8] [--rounds 3]

A rank imports what a reinforcement-learning run imports on a CPU, waits until all have, and ends. Both ways in turn:
seconds until all are there, CPU seconds of all processes, and their memory by proportional set size (a page that n
processes share counts 1/n in each).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.in_turn import compare
from r1mega.launch import local, supervise

RANK = """
import os, time
from pathlib import Path
from r1mega.parallel import device, fork
device.prepare("cpu")
from r1mega.loop import hybrid
from r1mega.rollout import embedded
fork.divide()
place, rank, ranks = Path(os.environ["PLACE"]), os.environ["RANK"], int(os.environ["WORLD_SIZE"])
(place / f"here{rank}").touch()
while len(list(place.glob("here*"))) < ranks:
    time.sleep(0.01)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
(place / f"kib{rank}").write_text(next(line.split()[1] for line in lines if line.startswith("Pss:")))
while len(list(place.glob("kib*"))) < ranks:
    time.sleep(0.01)
"""


@dataclass(frozen=True)
class Start:
    """One start: wall and CPU seconds, and GB of all ranks together."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{'ranks':>5}  {'':7}  {'seconds':>8}  {'CPU s':>6}  {'GB':>5}   medians of {args.rounds} rounds")
    for ranks in args.ranks:
        ways = {"each": partial(start, ranks, False), "divided": partial(start, ranks, True)}
        for way, (seconds, cpu, gigabytes) in compare(ways, args.rounds).items():
            print(f"{ranks:5}  {way:7}  {seconds:8.1f}  {cpu:6.1f}  {gigabytes:5.2f}", flush=True)


def start(ranks: int, divides: bool) -> Start:
    """Start so many ranks and see them end."""
    with tempfile.TemporaryDirectory() as place:
        env = {**local.worker_env("cpu", 1), "PLACE": place, "PYTHONWARNINGS": "ignore"}
        begin, before = time.monotonic(), os.times()
        argv = [sys.executable, "-c", RANK]
        result = supervise.run_world(argv, ranks, log_dir=Path(place) / "logs", env=env, divides=divides)
        if result.exit_code:
            sys.exit(result.message)
        seconds, after = time.monotonic() - begin, os.times()
        cpu = sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
        kib = sum(int(file.read_text()) for file in Path(place).glob("kib*"))
    return Start(seconds, cpu, kib * 1024 / 1e9)


if __name__ == "__main__":
    main()
