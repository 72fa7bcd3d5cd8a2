from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from r1mega.launch import engines
from r1mega.launch.engine_process import EngineProcess, Limits, NodeProcess
from r1mega.launch.engines import EngineFleet
from r1mega.launch.ports import free_port
from r1mega.launch.supervise import run_world
from r1mega.weights.shelf import Shelf

sys.path.insert(0, str(Path(__file__).parent))
from fake_engines import SERVER, has_ended, is_gone, pid, until

GENEROUS = Limits(startup_seconds=60, hang_seconds=60, restarts=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(engines, "_CHECK_SECONDS", 1.0)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., EngineFleet]]:
    """`fleet(first, limits, count)` -> started servers; all are ended."""
    made: list[EngineFleet] = []

    def make(first: str = "", limits: Limits = GENEROUS, count: int = 1) -> EngineFleet:
        place = Shelf(tmp_path / "engines")
        place.prepare()
        found = []
        for index in range(count):
            port = free_port()
            argv = [sys.executable, "-c", SERVER.format(first=first), str(port)]
            node = NodeProcess(lambda argv=argv: [*argv, "v" + str(len(made))], {}, tmp_path / f"engine{index}.log")
            found.append(EngineProcess(f"engine {index}", f"http://127.0.0.1:{port}", [node], limits))
        made.append(EngineFleet(found, place))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_servers_come_up_and_end(fleet: Callable[..., EngineFleet]) -> None:
    both = fleet("child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True)", count=2)
    both.start()
    until(lambda: all(engine.answered for engine in both.engines), both)
    children = [int(engine.log.read_text().split("child ")[1].split()[0]) for engine in both.engines]
    both.end()
    until(lambda: all(map(is_gone, [*children, *map(pid, both.engines)])))
    assert not both._place.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_killed_or_hangs_is_started_again(
    number: int, fleet: Callable[..., EngineFleet], capsys: pytest.CaptureFixture[str]
) -> None:
    one = fleet(limits=Limits(startup_seconds=60, hang_seconds=2.0, restarts=1))
    one.start()
    engine = one.engines[0]
    until(lambda: engine.answered, one)
    first = pid(engine)
    os.killpg(first, number)
    until(lambda: engine.starts == 2, one)
    assert is_gone(first)
    until(lambda: engine.answered, one)
    assert httpx.get(engine.url + "/health").status_code == 200
    word = "was killed by SIGKILL" if number == signal.SIGKILL else r"has not answered for"
    assert f"r1mega: engine 0 {word}" in capsys.readouterr().err
    # Once too often.
    os.killpg(pid(engine), signal.SIGKILL)
    until(lambda: has_ended(engine))
    message = one.look()
    assert message and message.startswith(f"engine 0 at {engine.url} was killed by SIGKILL, after 1 of 1 restarts")
    assert "  | started" in message and message.endswith(f"log: {engine.log}")


def test_no_server_is_started_in_the_trainers_turn(
    fleet: Callable[..., EngineFleet], capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take the memory that trains: one that ends waits until the servers' turn comes."""
    both = fleet(count=2)
    both.start()
    until(lambda: all(engine.answered for engine in both.engines), both)
    place = both._place
    assert place.processes() == [pid(engine) for engine in both.engines]
    place.set_turn(trainers=True)
    os.killpg(pid(both.engines[0]), signal.SIGKILL)
    until(lambda: both.engines[0].due, both)
    for _ in range(10):
        assert both.look() is None and both.engines[0].starts == 1
    assert capsys.readouterr().err == ""
    place.set_turn(trainers=False)
    until(lambda: both.engines[0].starts == 2 and both.engines[0].answered, both)
    assert "r1mega: engine 0 was killed by SIGKILL; starting it again" in capsys.readouterr().err
    assert place.processes() == [pid(engine) for engine in both.engines] and both.engines[1].starts == 1


def test_a_server_that_ends_at_once(fleet: Callable[..., EngineFleet]) -> None:
    one = fleet("sys.exit('no such model')")
    one.start()
    until(lambda: has_ended(one.engines[0]))
    message = one.look()
    assert message and "ended with exit code 1 before it first answered" in message and "  | no such model" in message


def test_a_server_that_never_answers(fleet: Callable[..., EngineFleet]) -> None:
    one = fleet("time.sleep(600)", Limits(startup_seconds=0.3, hang_seconds=60, restarts=3))
    one.start()
    message = None
    deadline = time.monotonic() + 10
    while message is None and time.monotonic() < deadline:
        message = one.look()
    assert message and "has not answered 0 s after its start (sglang.startup_seconds)" in message
    assert is_gone(pid(one.engines[0]))


def test_a_taken_port(fleet: Callable[..., EngineFleet], tmp_path: Path) -> None:
    import socket

    one = fleet()
    port = int(one.engines[0].url.rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        one.start()
        until(lambda: has_ended(one.engines[0]))
        message = one.look()
    assert message and "before it first answered" in message and "Address already in use" in message
    # SGLang only says it, and stays.
    two = fleet("print('[Errno 98] error: address already in use', flush=True); time.sleep(600)")
    two.start()
    until(lambda: b"address already" in two.engines[0].log.read_bytes())
    message = two.look()
    assert message and "found its port taken" in message


def test_a_world_ends_with_its_servers(fleet: Callable[..., EngineFleet], tmp_path: Path) -> None:
    """Both ways: the ranks end when a server cannot be had, and the servers when the ranks are done."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    one = fleet("sys.exit('no such model')")
    result = run_world(argv, 2, log_dir=tmp_path / "logs", beside=one, grace_seconds=1)
    assert result.exit_code == 1 and "no such model" in result.message
    assert result.message.endswith("all 2 ranks have ended")
    two = fleet()
    result = run_world([sys.executable, "-c", "import time; time.sleep(1)"], 1, log_dir=tmp_path / "logs", beside=two)
    assert (result.exit_code, result.message) == (0, "")
    assert is_gone(pid(two.engines[0]))


LAUNCHER = """
import sys, time
from pathlib import Path
from r1mega.launch.engine_process import EngineProcess, Limits, NodeProcess
from r1mega.launch.engines import EngineFleet
from r1mega.weights.shelf import Shelf
place = Shelf(Path(sys.argv[1]) / "engines")
place.prepare()
argv = [sys.executable, "-c", sys.argv[3], sys.argv[2]]
node = NodeProcess(lambda: argv, {{}}, Path(sys.argv[1]) / "engine0.log")
engine = EngineProcess("engine 0", "http://127.0.0.1:" + sys.argv[2], [node], Limits(60, 60, 0))
EngineFleet([engine], place).start()
time.sleep(600)
"""


def test_servers_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    server = SERVER.format(first="child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True)")
    argv = [sys.executable, "-c", LAUNCHER.format(), str(tmp_path), str(free_port()), server]
    with subprocess.Popen(argv) as launcher:
        log = tmp_path / "engine0.log"
        until(lambda: log.exists() and "child" in log.read_text())
        words = log.read_text().split()
        started = [int(words[words.index(word) + 1]) for word in ("started", "child")]
        assert not any(map(is_gone, started))
        launcher.kill()
    until(lambda: all(map(is_gone, started)))


def test_the_shelf(tmp_path: Path) -> None:
    place = Shelf(tmp_path / "engines")
    place.prepare()
    assert place.newest() is None
    for version in (3, 4):
        place.path(version).mkdir()
        place.set_newest(version)
    newest = place.newest()
    assert newest is not None and (newest.version, newest.path) == (4, place.path(4))
    place.path(2).mkdir()
    place.drop_others(3, 4)
    assert sorted(path.name for path in place.folder.iterdir()) == ["newest", "version-000003", "version-000004"]
    place.drop_others(4)
    assert sorted(path.name for path in place.folder.iterdir()) == ["newest", "version-000004"]
    place.clear()
    assert not place.folder.exists()
