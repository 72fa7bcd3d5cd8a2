"""A stage's process is ended with all that it started, however it came to be ended."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from r1mega.loop.stop import STOPPED
from r1mega.pipeline import child
from r1mega.pipeline.child import Signals

DEAF = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(other.pid))
time.sleep(600)
"""
OBEDIENT = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.02)
sys.exit(75)
"""


def run(program: str, place: Path, signals: Signals, *, minutes: float = 5.0, tick=lambda: None, **more) -> child.Ended:
    command = [sys.executable, "-S", "-c", program, str(place / "told")]
    process = child.Child(command, place / "log", minutes=minutes, signals=signals, **more)
    while (ended := process.check()) is None:
        tick()
        time.sleep(child.POLL_SECONDS)
    return ended


@pytest.mark.parametrize(("code", "expected"), [("3", 3), ("0", 0)])
def test_its_exit_code_and_output(tmp_path: Path, code: str, expected: int) -> None:
    ended = run(f"print('said'); raise SystemExit({code})", tmp_path, Signals())
    assert (ended.code, ended.why) == (expected, "")
    assert (tmp_path / "log").read_text() == "said\n"


def test_one_that_is_deaf_is_ended_with_its_children(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 1.0)
    signals, told = Signals(), tmp_path / "told"

    def tick() -> None:
        if told.exists() and told.read_text():
            signals.ends.append(signal.SIGTERM)

    ended = run(DEAF, tmp_path, signals, tick=tick)
    assert (ended.code, ended.why) == (143, "ended by SIGTERM")
    limit = time.monotonic() + 20
    while psutil.pid_exists(int(told.read_text())) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(told.read_text()))


def test_one_that_is_asked_to_stop_may_save_first(tmp_path: Path) -> None:
    signals = Signals(stops=[signal.SIGUSR1])
    ended = run(OBEDIENT, tmp_path, signals, ask=lambda why: (tmp_path / "told").write_text(why))
    assert ended.code == STOPPED and (tmp_path / "told").read_text() == "SIGUSR1"


def test_one_that_cannot_be_asked_is_ended(tmp_path: Path) -> None:
    assert run(OBEDIENT, tmp_path, Signals(stops=[signal.SIGUSR1])).code == STOPPED
