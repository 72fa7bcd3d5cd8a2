from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from r1mega.launch.supervise import WorldResult, run_world, tail
from r1mega.loop.stop import STOPPED

only_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux kills children with their parent, or adopts"
)
# A process for each rank, for which `divide` does nothing, or one that becomes them all.
HEADER = (
    "import os, signal, sys, time\nfrom r1mega.parallel import fork\nfork.divide()\nrank = int(os.environ['RANK'])\n"
)


@pytest.fixture(autouse=True, params=[False, pytest.param(True, marks=only_linux)], ids=["each", "divided"])
def divides(request: pytest.FixtureRequest) -> bool:
    """Whether the ranks are forks of one process."""
    return request.param


@pytest.fixture
def world(tmp_path: Path, divides: bool) -> Callable[..., WorldResult]:
    """`world(code, size=3, grace_seconds=2.0, **env)` -> how a world of such ranks ended."""

    def run(code: str, size: int = 3, grace_seconds: float = 2.0, **env: str) -> WorldResult:
        argv = [sys.executable, "-c", HEADER + textwrap.dedent(code)]
        env = {"PLACE": str(tmp_path), **env}
        logs = tmp_path / "logs"
        return run_world(argv, size, log_dir=logs, env=env, grace_seconds=grace_seconds, divides=divides)

    return run


NOTE_PID = "open(os.path.join(os.environ['PLACE'], f'pid{rank}'), 'w').write(str(os.getpid()))\n"


def pids(place: Path, number: int, seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [file.read_text() for file in sorted(place.glob("pid*"))]
        if len(found) == number and all(found):
            return [int(text) for text in found]
        time.sleep(0.02)
    raise AssertionError(f"{number} processes did not come up")


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    """Ended; a zombie that nobody has reaped yet counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_every_rank_gets_its_numbers_and_its_log(world, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('out', rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], os.environ['EXTRA'])\n"
    code += "print('err', rank, file=sys.stderr)"
    assert world(code, EXTRA="x") == WorldResult(0)
    logs = [(tmp_path / "logs" / f"rank{rank}.log").read_text().split("\n") for rank in range(3)]
    assert sorted(logs[1]) == ["", "err 1", "out 1 3 1 x"]
    assert sorted(logs[2]) == ["", "err 2", "out 2 3 2 x"]
    # Rank 0 speaks to the terminal; what it complains about goes to its log.
    assert logs[0] == ["err 0", ""]
    assert capfd.readouterr().out == "out 0 3 0 x\n"


def test_a_crash_ends_the_world_and_is_named_with_its_traceback(world, tmp_path: Path) -> None:
    code = NOTE_PID + "if rank == 1:\n    raise RuntimeError('the bolt is loose')\ntime.sleep(60)"
    begin = time.monotonic()
    result = world(code)
    assert time.monotonic() - begin < 10
    assert (result.exit_code, result.failed_rank) == (1, 1)
    assert result.message.startswith("rank 1 of 3 failed first (exit code 1)")
    assert "Traceback (most recent call last)" in result.message
    assert "RuntimeError: the bolt is loose" in result.message
    assert str(tmp_path / "logs" / "rank1.log") in result.message
    assert "run.timeout_minutes" not in result.message
    assert all(is_gone(int(file.read_text()), 0.1) for file in tmp_path.glob("pid*"))


def test_who_waited_too_long_in_a_collective_is_told_the_limit_and_where_to_look(world, tmp_path: Path) -> None:
    """The words are gloo's own: two ranks of a real group, of which one does not come."""
    code = """
from datetime import timedelta
import torch, torch.distributed as dist
store = dist.FileStore(os.environ["PLACE"], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
if rank == 0:
    dist.all_reduce(torch.zeros(1))
time.sleep(60)
"""
    result = world(code, size=2, PLACE=str(tmp_path / "store"))
    assert result.failed_rank == 0
    assert "waited in a collective for longer than run.timeout_minutes" in result.message


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(world, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + NOTE_PID
    code += "if rank == 2:\n    time.sleep(0.5)\n    sys.exit(7)\ntime.sleep(60)"
    begin = time.monotonic()
    result = world(code, grace_seconds=1.0)
    assert 1.0 < time.monotonic() - begin < 8
    assert (result.exit_code, result.failed_rank) == (7, 2)
    assert all(is_gone(pid, 0.1) for pid in pids(tmp_path, 3))


def test_death_by_signal_is_named(world, tmp_path: Path) -> None:
    result = world("if rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert (result.exit_code, result.failed_rank) == (128 + signal.SIGKILL, 0)
    assert "killed by SIGKILL" in result.message
    assert "its log is empty" in result.message


def test_a_rank_that_lost_its_peer_is_not_blamed(world, tmp_path: Path) -> None:
    # Rank 0 is gone first, but only because rank 1 is on its way out.
    code = """
        if rank == 0:
            raise RuntimeError('[gloo] Connection closed by peer [127.0.0.1]:1234')
        if rank == 1:
            time.sleep(0.3)
            raise ValueError('the cause')
        time.sleep(60)
    """
    result = world(code)
    assert result.failed_rank == 1
    assert "ValueError: the cause" in result.message


def test_without_a_better_explanation_the_lost_peer_is_reported(world, tmp_path: Path) -> None:
    result = world("if rank == 1:\n    raise RuntimeError('Connection closed by peer')\ntime.sleep(60)")
    assert result.failed_rank == 1


def test_what_a_rank_leaves_running_ends_with_the_world(world, tmp_path: Path) -> None:
    code = """
        import subprocess
        child = subprocess.Popen(['sleep', '60'])
        open(os.path.join(os.environ['PLACE'], f'pid{rank}'), 'w').write(str(child.pid))
    """
    assert world(code, size=2).exit_code == 0
    assert all(is_gone(pid) for pid in pids(tmp_path, 2))


@pytest.fixture
def launcher(tmp_path: Path, divides: bool) -> Callable[..., subprocess.Popen[str]]:
    """`launcher(code, grace_seconds=2.0)` -> a process that has started a world of three ranks."""
    return partial(_launcher, tmp_path, divides)


def _launcher(tmp_path: Path, divides: bool, code: str, grace_seconds: float = 2.0) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HEADER + code]
    script = f"""
import sys
from pathlib import Path
from r1mega.launch.supervise import run_world
env = {{"PLACE": {str(tmp_path)!r}}}
logs = Path({str(tmp_path)!r}) / "logs"
result = run_world({argv!r}, 3, log_dir=logs, env=env, grace_seconds={grace_seconds}, divides={divides})
print(result.message)
sys.exit(result.exit_code)
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_ends_all(launcher, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = launcher(NOTE_PID + "time.sleep(60)")
    ranks = pids(tmp_path, 3)
    begin = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert process.returncode == code
    assert out == f"stopped by {number.name}: all 3 ranks have ended\n"
    assert all(is_gone(pid, 0.1) for pid in ranks)


def test_a_second_signal_does_not_wait_for_the_grace(launcher, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + NOTE_PID + "time.sleep(60)"
    process = launcher(code, grace_seconds=50.0)
    ranks = pids(tmp_path, 3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert all(is_gone(pid, 0.1) for pid in ranks)


@only_linux
def test_killing_the_launcher_kills_the_ranks(launcher, tmp_path: Path) -> None:
    process = launcher(NOTE_PID + "time.sleep(60)")
    ranks = pids(tmp_path, 3)
    assert not any(is_gone(pid, 0.05) for pid in ranks)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert all(is_gone(pid) for pid in ranks)


def test_a_command_that_does_not_exist_leaves_nothing(tmp_path: Path, divides: bool) -> None:
    with pytest.raises(FileNotFoundError):
        run_world([str(tmp_path / "absent")], 2, log_dir=tmp_path, divides=divides)


def test_tail_begins_at_the_last_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trace = "Traceback (most recent call last):\n  File 'a'\nValueError: second"
    log.write_text("noise\n" * 100 + "Traceback (most recent call last):\nValueError: first\nmore\n" + trace + "\n")
    assert tail(log) == trace
    log.write_text("\n".join(str(i) for i in range(100)))
    assert tail(log, limit=3) == "97\n98\n99"


def test_sigusr1_asks_and_ranks_that_stop_so_have_not_failed(tmp_path: Path, divides: bool) -> None:
    """The launcher itself stays in charge: a rank that fails meanwhile is a failure still."""
    asked: list[str] = []

    def ask(why: str) -> None:
        asked.append(why)
        (tmp_path / "stop").touch()

    program = f"""
{HEADER}
import pathlib
place = pathlib.Path({str(tmp_path)!r})
if os.environ["RANK"] == "0":
    os.kill(os.getppid(), signal.SIGUSR1)
while not (place / "stop").exists():
    time.sleep(0.01)
time.sleep(float(os.environ["RANK"]))
raise SystemExit({STOPPED} if os.environ["RANK"] != os.environ.get("FAILS") else 1)
"""
    argv = [sys.executable, "-c", program]
    result = run_world(argv, 2, log_dir=tmp_path / "logs", ask_to_stop=ask, divides=divides)
    assert (result.exit_code, asked) == (STOPPED, ["SIGUSR1"])
    assert "stopped as asked, after a checkpoint" in result.message
    result = run_world(argv, 2, log_dir=tmp_path / "logs", ask_to_stop=ask, divides=divides, env={"FAILS": "1"})
    assert (result.exit_code, result.failed_rank) == (1, 1)
