"""Ranks of a Slurm step: what each reports, and what is made of it. A shell script stands for srun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.launch import slurm_world
from r1mega.launch.far_leash import __file__ as FAR_LEASH
from r1mega.launch.slurm_rank import rank_env
from r1mega.launch.slurm_world import World
from r1mega.loop import stop
from r1mega.loop.stop import STOPPED

NUMBERS = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURMD_NODENAME": "n2"}


def start_rank(place: Path, program: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "r1mega.launch.slurm_rank", "--folder", str(place), "--run-dir", str(place)]
    command += ["--per-node", "4", "--", sys.executable, "-c", program]
    return subprocess.Popen(command, env={**os.environ, **NUMBERS}, stdout=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def test_slurms_numbers_become_torchs() -> None:
    assert rank_env(NUMBERS, 4) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(("end", "status", "code"), [("sys.exit(3)", "3", 3), ("os.kill(os.getpid(), 9)", "-9", 137)])
def test_a_rank_reports_where_it_is_and_how_it_ended(tmp_path: Path, end: str, status: str, code: int) -> None:
    rank = start_rank(tmp_path, f"import os, sys; print(os.environ['RANK']); sys.stdout.flush(); {end}")
    assert rank.communicate(timeout=30)[0] == b"5\n"
    assert rank.returncode == code
    assert (tmp_path / "rank5.started").read_text() == "n2"
    assert (tmp_path / "rank5.ended").read_text() == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_run_to_stop_and_leaves_the_rank_alone(tmp_path: Path, number: signal.Signals) -> None:
    """It reaches all of a task's processes with some of Slurm's plugins: what the rank has started is deaf as well."""
    program = f"""
import os, pathlib, subprocess, sys
ready = pathlib.Path({str(tmp_path)!r}) / "ready"
child = subprocess.Popen(["sleep", "60"])
ready.write_text(f"{{os.getpid()}} {{child.pid}}")
while not (ready.parent / "{stop.STOP_FILE}").exists():
    pass
assert child.poll() is None
child.kill()
sys.exit({STOPPED})
"""
    rank = start_rank(tmp_path, program)
    wait_for(tmp_path / "ready")
    for process in map(int, (tmp_path / "ready").read_text().split()):
        os.kill(process, number)
    time.sleep(0.2)
    assert stop.asked(tmp_path) is None
    rank.send_signal(number)
    rank.communicate(timeout=30)
    assert rank.returncode == STOPPED
    assert stop.asked(tmp_path) == f"{number.name} to rank 5"


def world(place: Path, script: str, size: int = 4) -> World:
    """A step whose srun is a shell script: `end RANK STATUS` reports, `say RANK TEXT` logs."""
    head = """
end() { echo -n "$2" >"$FOLDER/rank$1.ended.part"; mv "$FOLDER/rank$1.ended.part" "$FOLDER/rank$1.ended"; }
say() { echo "$2" >>"$LOGS/rank$1.log"; }
for i in 0 1 2 3; do : >"$LOGS/rank$i.log"; echo -n n$((i / 2 + 1)) >"$FOLDER/rank$i.started"; done
"""
    folder, logs = place / "start", place / "logs"
    folder.mkdir(exist_ok=True)
    logs.mkdir(exist_ok=True)
    env = {**os.environ, "FOLDER": str(folder), "LOGS": str(logs)}
    return World(["bash", "-c", head + script], size, folder, logs, env)


def test_all_ranks_at_their_end(tmp_path: Path) -> None:
    assert world(tmp_path, "for i in 0 1 2 3; do end $i 0; done").run().exit_code == 0


def test_ranks_that_stopped_as_asked_have_not_failed(tmp_path: Path) -> None:
    result = world(
        tmp_path, f"end 0 {STOPPED}; sleep 1; for i in 1 2 3; do end $i {STOPPED}; done; exit {STOPPED}"
    ).run()
    assert result.exit_code == STOPPED and result.message == ""


def test_the_rank_that_failed_first_is_named_with_its_last_words(tmp_path: Path) -> None:
    """Its peers fail after it, complaining of it; the others, which would wait for ever, are ended."""
    script = """
say 2 'ValueError: the cause'; end 2 1
say 0 'RuntimeError: Connection closed by peer'; end 0 1
sleep 60
"""
    began = time.monotonic()
    result = world(tmp_path, script).run()
    assert time.monotonic() - began < 30
    assert (result.exit_code, result.failed_rank) == (1, 2)
    assert result.message.startswith("rank 2 of 4 on n2 failed first (exit code 1); all ranks have ended")
    assert "ValueError: the cause" in result.message


def test_ranks_that_end_without_a_word_are_named_with_their_machines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm_world, "_LATE_SECONDS", 0.5)
    script = "rm $FOLDER/rank3.started; end 0 0; end 1 0; echo 'srun: error: Node failure on n2' >&2; exit 1"
    result = world(tmp_path, script).run()
    assert result.exit_code == 1
    assert result.message.startswith("ranks 2 (on n2), 3 (never started) of 4 ended without a word")
    assert "Node failure on n2" in result.message


def test_servers_that_cannot_go_on_end_the_ranks(tmp_path: Path) -> None:
    class Servers:
        calls: list[str] = []

        def start(self) -> None:
            self.calls.append("start")

        def look(self) -> str | None:
            return "engine 0 ended"

        def end(self) -> None:
            self.calls.append("end")

    result = world(tmp_path, "sleep 60").run(Servers())
    assert result.exit_code == 1 and result.message == "engine 0 ended\nall 4 ranks have ended"
    assert Servers.calls == ["start", "end"]


@pytest.mark.parametrize(("deaf", "survives"), [("1", True), ("", False)])
def test_servers_of_a_job_answer_until_the_trainers_have_saved(tmp_path: Path, deaf: str, survives: bool) -> None:
    program = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'ready').touch(); time.sleep(60)"
    command = [sys.executable, "-I", FAR_LEASH, sys.executable, "-c", program]
    leash = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "R1MEGA_DEAF": deaf})
    wait_for(tmp_path / "ready")
    leash.terminate()
    time.sleep(1)
    assert (leash.poll() is None) is survives
    leash.stdin.close()
    leash.wait(timeout=20)


def test_who_asks_is_read_and_withdrawn(tmp_path: Path) -> None:
    assert stop.asked(tmp_path) is None
    stop.ask(tmp_path, "SIGUSR1 to the job")
    assert stop.asked(tmp_path) == "SIGUSR1 to the job"
    stop.withdraw(tmp_path)
    stop.withdraw(tmp_path)
    assert stop.asked(tmp_path) is None
