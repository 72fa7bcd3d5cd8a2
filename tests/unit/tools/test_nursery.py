"""tools/parity/nursery.py: worlds end as `supervise` would have them end, and none outlives who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parity import nursery as nursery_module

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


class Ending:
    """A process that has ended with `code` from the given look at it on, or once it is killed."""

    def __init__(self, code: int, look: float) -> None:
        self.code, self.look, self.looks = code, look, 0
        self.sentinel, self._end = os.pipe()
        if look != float("inf"):
            self.kill()

    @property
    def exitcode(self) -> int | None:
        self.looks += 1
        return self.code if self.looks >= self.look else None

    def kill(self) -> None:
        """As an end does: the sentinel is ready before, or after, a look says so."""
        if self.look == float("inf"):
            self.code, self.look = -signal.SIGKILL, 0
        if self._end is not None:
            os.close(self._end)
            self._end = None


@pytest.mark.parametrize("look", [1, 2, 3, 4, 5])
def test_a_failure_is_seen_whenever_it_comes(look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, (asks, silent), real_wait = [Ending(0, float("inf")), Ending(7, look)], os.pipe(), nursery_module.wait

    def wait_and_see(objects: list[int]) -> list[int]:
        ready = real_wait(objects, timeout=0)
        assert ready, "it waits for the rank that does not end by itself"
        return ready

    with os.fdopen(asks) as asking, os.fdopen(silent, "w"):
        monkeypatch.setattr(nursery_module.sys, "stdin", asking)
        monkeypatch.setattr(nursery_module, "wait", wait_and_see)
        assert nursery_module._see_them_end(ranks) == [1]
    for rank in ranks:
        os.close(rank.sentinel)
