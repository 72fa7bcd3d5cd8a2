"""Ranks that are forks of one process: what else can happen than to ranks that are each started (test_supervise.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from r1mega.launch.supervise import run_world

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux adopts orphans")

# What is done before the process divides, and then by each rank.
PROGRAM = """
import os, pathlib, random, sys, time
place = pathlib.Path({place!r})
(place / "common").write_text(str(os.getpid()))
{before}
from r1mega.parallel import fork
fork.divide()
rank = os.environ["RANK"]
{after}
"""


def program(place: Path, before: str = "", after: str = "") -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(place=str(place), before=before, after=after)]


def read(path: Path, seconds: float = 20.0) -> str:
    """The text of a file that will be there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path.name} was not written")


def test_what_is_imported_is_shared_and_the_rest_is_each_ranks_own(tmp_path: Path) -> None:
    after = """

name = pathlib.Path("/proc/self/comm").read_text().strip()
about = [os.getppid(), os.getpgid(0) == os.getpid(), name, random.random(), fork.ORDER in os.environ, imported]
(place / f"rank{rank}").write_text(repr(about))
"""
    argv = program(tmp_path, "imported = time.monotonic()", after)
    assert run_world(argv, 3, log_dir=tmp_path / "logs", divides=True).exit_code == 0
    parents, leads, names, numbers, ordered, imported = zip(
        *(eval((tmp_path / f"rank{rank}").read_text()) for rank in range(3)), strict=True
    )
    assert set(parents) == {os.getpid()}, "whoever starts them watches them and reaps them"
    assert set(leads) == {True}
    assert names == ("rank0", "rank1", "rank2")
    assert len(set(numbers)) == 3, "forks draw random numbers of their own"
    assert set(ordered) == {False}, "what a rank starts must not divide again"
    assert len(set(imported)) == 1
    assert not psutil.pid_exists(int((tmp_path / "common").read_text()))


def test_threads_of_torch_work_in_forks(tmp_path: Path) -> None:
    """OpenMP's team and OpenBLAS's threads are not copied by a fork: each rank has to start its own."""
    before = "import torch, numpy\nfrom r1mega.parallel import device\ndevice.prepare('cpu', threads=2)"
    after = """
a = torch.randn(600, 600)
assert torch.allclose(a @ a, torch.from_numpy(a.numpy() @ a.numpy()), atol=1e-3)
assert torch.get_num_threads() == 2 and len(os.listdir("/proc/self/task")) > 1
"""
    env = {"OMP_NUM_THREADS": "2"}
    result = run_world(program(tmp_path, before, after), 2, log_dir=tmp_path / "logs", env=env, divides=True)
    assert result.exit_code == 0, result.message


def test_an_import_that_fails_is_told_once_with_its_traceback(tmp_path: Path) -> None:
    result = run_world(program(tmp_path, "import no_such_module"), 3, log_dir=tmp_path / "logs", divides=True)
    assert (result.exit_code, result.failed_rank) == (1, None)
    assert result.message.startswith("the process that was to become 3 ranks ended before it did (exit code 1)\n")
    assert result.message.count("ModuleNotFoundError: No module named 'no_such_module'") == 1
    assert result.message.endswith(f"log: {tmp_path / 'logs' / 'rank0.log'}")


@pytest.mark.parametrize(
    ("before", "how", "code"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL", 128 + 9),
        ("sys.exit(0)", "exit code 0", 1),
        ("os._exit(75)", "exit code 75", 75),
    ],
)
def test_a_process_that_ends_before_it_divides(tmp_path: Path, before: str, how: str, code: int) -> None:
    result = run_world(program(tmp_path, before), 2, log_dir=tmp_path / "logs", divides=True)
    assert result.exit_code == code
    assert f"ended before it did ({how})" in result.message


def test_forks_that_nobody_was_told_of_end(tmp_path: Path) -> None:
    """The common process is killed between its forks and its report: no rank may begin, and none may be left."""
    before = """
import json
real = json.dumps
def dumps(pids):
    (place / "forks").write_text(real(pids))
    os.kill(os.getpid(), 9)
json.dumps = dumps
"""
    result = run_world(program(tmp_path, before, "time.sleep(60)"), 3, log_dir=tmp_path / "logs", divides=True)
    assert result.exit_code == 128 + 9
    forks = [int(pid) for pid in (tmp_path / "forks").read_text().strip("[]").split(",")]
    assert len(forks) == 3
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(_is_running(pid) for pid in forks):
        time.sleep(0.02)
    assert not any(_is_running(pid) for pid in forks)


LAUNCHER = """
import sys
from pathlib import Path
from r1mega.launch.supervise import run_world
result = run_world({argv!r}, 3, log_dir=Path({logs!r}), divides=True)
print(result.message)
sys.exit(result.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_during_the_imports(tmp_path: Path, number: signal.Signals) -> None:
    argv = program(tmp_path, "time.sleep(60)")
    script = LAUNCHER.format(argv=argv, logs=str(tmp_path / "logs"))
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    common = int(read(tmp_path / "common"))
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=20)
    if number == signal.SIGINT:
        assert (launcher.returncode, out) == (130, "stopped by SIGINT before there were ranks\n")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(common):
        time.sleep(0.02)
    assert not _is_running(common)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
