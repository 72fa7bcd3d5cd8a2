"""tools/parity/nursery.py: worlds end as `supervise` would have them end, and none outlives who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAM = """
import os, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "is", os.getpid(), flush=True)
if what == "wait" or (what == "fail" and rank == 0):
    time.sleep(60)
if what == "fail":
    raise ValueError("no luck")
"""
ASK = """
import sys
from pathlib import Path
from parity.nursery import Nursery
Nursery().run_world([sys.executable, sys.argv[1], "wait"], 2, log_dir=Path(sys.argv[2]))
"""


def test_how_a_world_ends(nursery, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    well = nursery.run_world([sys.executable, str(program), "end"], 2, log_dir=tmp_path / "well")
    assert (well.exit_code, well.message) == (0, "")
    assert (tmp_path / "well" / "rank1.log").read_text().startswith("rank 1 of 2 is")
    started = time.monotonic()
    badly = nursery.run_world([sys.executable, str(program), "fail"], 2, log_dir=tmp_path / "badly")
    assert time.monotonic() - started < 30, "the rank that waits is ended"
    assert (badly.exit_code, badly.failed_rank) == (1, 1)
    assert "ValueError: no luck" in badly.message
    again = nursery.run_world([sys.executable, str(program), "end"], 1, log_dir=tmp_path / "again")
    assert again.exit_code == 0


def test_a_world_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    program, logs = tmp_path / "program.py", [tmp_path / f"rank{rank}.log" for rank in range(2)]
    program.write_text(PROGRAM)
    tools = Path(__file__).resolve().parents[3] / "tools"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")])}
    asking = subprocess.Popen([sys.executable, "-c", ASK, str(program), str(tmp_path)], env=environment)
    limit = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert time.monotonic() < limit and asking.poll() is None
        time.sleep(0.05)
    ranks = [psutil.Process(int(log.read_text().split()[-1])) for log in logs]
    asking.send_signal(signal.SIGKILL)
    asking.wait(timeout=10)
    _, living = psutil.wait_procs(ranks, timeout=20)
    assert living == []
