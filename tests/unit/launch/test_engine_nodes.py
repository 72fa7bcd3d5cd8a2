"""Servers of several nodes, and on other machines."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from r1mega.config import choices, schema
from r1mega.launch import engine_process, engines, far_leash
from r1mega.launch.engine_process import EngineProcess, Limits, NodeProcess
from r1mega.launch.engines import EngineFleet, fleet_of
from r1mega.launch.ports import free_port
from r1mega.weights.shelf import Addresses, Shelf

sys.path.insert(0, str(Path(__file__).parent))
from fake_engines import SERVER, is_gone, until

LIMITS = Limits(startup_seconds=60, hang_seconds=60, restarts=2)
CHILD = "child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_POLL_SECONDS", 0.05)


def started(log: Path) -> list[int]:
    """Processes that wrote to a log: the server and its child, of each start."""
    words = log.read_text().split() if log.exists() else []
    return [int(number) for word, number in zip(words, words[1:], strict=False) if word in ("started", "child")]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Callable[..., EngineFleet]]:
    """`two_nodes(first)` -> one server of two processes; `first` is what both do before they answer."""
    made: list[EngineFleet] = []

    def make(first: str = "", second: str = "") -> EngineFleet:
        place = Shelf(tmp_path / "engines")
        place.prepare()
        ports = [free_port()]
        ports.append(free_port(taken=ports))
        nodes = []
        for node, does in enumerate((first, second)):
            argv = [sys.executable, "-c", SERVER.format(first=does), str(ports[node])]
            nodes.append(NodeProcess(lambda argv=argv: argv, {}, tmp_path / f"node{node}.log"))
        engine = EngineProcess("engine 0", f"http://127.0.0.1:{ports[0]}", nodes, LIMITS)
        made.append(EngineFleet([engine], place))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_loses_one_of_its_nodes(two_nodes: Callable[..., EngineFleet], victim: int, tmp_path, capsys) -> None:
    """All of it is started again: the ranks that are left wait for those that are gone."""
    one = two_nodes()
    one.start()
    (engine,) = one.engines
    until(lambda: engine.answered, one)
    before = [node.process.pid for node in engine.nodes]
    os.killpg(before[victim], signal.SIGKILL)
    until(lambda: engine.starts == 2, one)
    assert all(map(is_gone, before))
    until(lambda: engine.answered, one)
    said = capsys.readouterr().err
    assert f"engine 0 on node {victim} was killed by SIGKILL; starting it again; log: {tmp_path}/node{victim}" in said
    one.end()
    assert all(is_gone(node.process.pid) for node in engine.nodes)


def test_a_node_that_cannot_start(two_nodes: Callable[..., EngineFleet], tmp_path: Path) -> None:
    """Its log is shown, though the first node is the one that is asked whether it is well."""
    one = two_nodes("time.sleep(600)", "sys.exit('no such model')")
    one.start()
    (engine,) = one.engines
    until(lambda: engine.nodes[1].process.poll() is not None)
    message = one.look()
    assert message and "on node 1 ended with exit code 1 before it first answered" in message
    assert "  | no such model" in message and message.endswith(f"log: {tmp_path / 'node1.log'}")
    assert is_gone(engine.nodes[0].process.pid)


# Stands for ssh and srun: what it starts is in no group or session of the launcher's machine, and reads its input.
FAR = "setsid --wait env R1MEGA_HOST={host}"


@pytest.fixture
def far_config(checkpoint: Callable[..., Path], tmp_path: Path) -> schema.Config:
    """Two servers of one process each, on hosts a and b."""
    config = schema.Config()
    config.run.dir, config.model.hf = str(tmp_path / "run"), str(checkpoint("qwen2"))
    config.device.type, config.precision.params = choices.DeviceType.cpu, choices.ParamDtype.fp32
    config.rollout.engine, config.rollout.engines = choices.EngineKind.sglang, 2
    config.sglang.python, config.sglang.hosts, config.sglang.remote = sys.executable, ["a", "b"], FAR
    config.sglang.weights_dir = str(tmp_path / "shared")
    (tmp_path / "logs").mkdir()
    return config


def test_where_servers_are_and_what_starts_them(far_config: schema.Config, tmp_path: Path) -> None:
    far_config.sglang.router = True
    fleet = fleet_of(far_config, tmp_path / "logs")
    assert [engine.url for engine in fleet.engines] == ["http://a:30000", "http://b:30000"]
    assert fleet.router is not None
    found = fleet._place.read_addresses()
    assert found == Addresses(["http://a:30000", "http://b:30000"], fleet.router.url)
    (node,) = fleet.engines[1].nodes
    command = list(node.command())
    assert command[:4] == ["setsid", "--wait", "env", "R1MEGA_HOST=b"] and command[4] == "/bin/sh"
    words = shlex.split(Path(command[5]).read_text().splitlines()[1])
    assert words[:2] == ["exec", "env"] and "PYTHONPATH=" in words and "SGLANG_USE_CPU_ENGINE=1" in words
    start = words.index("-m")
    assert words[start + 1] == "sglang.launch_server" and words[words.index("--host") + 1] == "0.0.0.0"
    leash = Path(words[words.index("-I") + 1])
    assert leash.read_bytes() == Path(far_leash.__file__).read_bytes() and leash.is_relative_to(tmp_path / "shared")
    urls = list(fleet.router.nodes[0].command())
    assert urls[-2:] == found.servers
    fleet.end()
    assert not leash.exists()


def test_a_server_that_starts_again_has_the_weights_published_last(far_config: schema.Config, tmp_path: Path) -> None:
    """On this machine and on others, asked at each start: before it serves."""
    for hosts in (["a", "b"], []):
        far_config.sglang.hosts = hosts
        fleet = fleet_of(far_config, tmp_path / "logs")
        (node,) = fleet.engines[0].nodes

        def flags(node: NodeProcess = node) -> dict[str, str]:
            command = list(node.command())
            if node.is_far:
                command = shlex.split(Path(command[-1]).read_text().splitlines()[1])
            return {flag: value for flag, value in zip(command, command[1:], strict=False) if flag.startswith("--")}

        assert (flags()["--load-format"], flags()["--weight-version"]) == ("dummy", "none")
        for version in (3, 4):
            fleet._place.path(version).mkdir()
            fleet._place.set_newest(version)
        found = flags()
        assert found["--model-path"] == str(fleet._place.path(4))
        assert (found["--load-format"], found["--weight-version"]) == ("auto", "4")
        fleet.end()


def far_node(tmp_path: Path, port: int) -> NodeProcess:
    """A fake server behind far_leash.py, out of the launcher's reach."""
    server = [sys.executable, "-c", SERVER.format(first=CHILD + "; print('scratch', os.environ['TMPDIR'])"), str(port)]
    command = [*shlex.split(FAR.replace("{host}", "a")), sys.executable, "-I", far_leash.__file__, *server]
    return NodeProcess(lambda: command, {}, tmp_path / "far.log", is_far=True)


def test_a_server_elsewhere_is_ended_and_started_again(tmp_path: Path) -> None:
    place = Shelf(tmp_path / "engines")
    place.prepare()
    port = free_port()
    node = far_node(tmp_path, port)
    fleet = EngineFleet([EngineProcess("engine 0", f"http://127.0.0.1:{port}", [node], LIMITS)], place)
    fleet.start()
    (engine,) = fleet.engines
    try:
        until(lambda: engine.answered, fleet)
        first = started(node.log)
        assert len(first) == 2 and os.getsid(first[0]) != os.getsid(0)
        os.kill(first[0], signal.SIGKILL)
        until(lambda: engine.starts == 2 and engine.answered, fleet)
        assert "ended with exit code 137" in engine.history[0]
        assert all(map(is_gone, first))
    finally:
        began = time.monotonic()
        fleet.end()
    assert time.monotonic() - began < 10  # it was told to, and not left to a minute of silence
    scratch = node.log.read_text().split("scratch ")[1].split()[0]
    assert "r1mega-engine-" in scratch and not Path(scratch).exists()
    assert all(map(is_gone, started(node.log)))


def test_the_launcher_is_heard_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it looks after its servers; what does not listen does not hold it up."""
    monkeypatch.setattr(engine_process, "BEAT_SECONDS", 0.05)
    place = Shelf(tmp_path / "engines")
    place.prepare()
    listens = "import sys; print('heard', len(sys.stdin.buffer.read(3)), flush=True); __import__('time').sleep(600)"
    deaf = "import time; time.sleep(600)"
    nodes = [
        NodeProcess(lambda code=code: [sys.executable, "-c", code], {}, tmp_path / f"{i}.log", is_far=True)
        for i, code in enumerate((listens, deaf))
    ]
    fleet = EngineFleet([EngineProcess("engine 0", "http://127.0.0.1:1", nodes, LIMITS)], place)
    monkeypatch.setattr(engine_process, "FAR_END_SECONDS", 1.0)
    fleet.start()
    try:
        assert nodes[1].process is not None and nodes[1].process.stdin is not None
        with suppress(BlockingIOError):
            while os.write(nodes[1].process.stdin.fileno(), bytes(4096)):
                pass
        until(lambda: "heard 3" in nodes[0].log.read_text(), fleet)
    finally:
        fleet.end()


LAUNCHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_engine_nodes import LIMITS, far_node
from r1mega.launch.engine_process import EngineProcess
from r1mega.launch.engines import EngineFleet
from r1mega.weights.shelf import Shelf
work, port = Path(sys.argv[2]), int(sys.argv[3])
place = Shelf(work / "engines")
place.prepare()
EngineFleet([EngineProcess("engine 0", f"http://127.0.0.1:{port}", [far_node(work, port)], LIMITS)], place).start()
time.sleep(600)
"""


def test_a_server_elsewhere_ends_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", LAUNCHER, str(Path(__file__).parent), str(tmp_path), str(free_port())]
    with subprocess.Popen(argv) as launcher:
        until(lambda: len(started(tmp_path / "far.log")) == 2, seconds=60)
        found = started(tmp_path / "far.log")
        assert not any(map(is_gone, found))
        launcher.kill()
    until(lambda: all(map(is_gone, found)))


def test_a_server_elsewhere_ends_in_silence(tmp_path: Path) -> None:
    """A launcher whose machine or network is gone closes nothing."""
    leash = tmp_path / "far_leash.py"
    leash.write_text(Path(far_leash.__file__).read_text().replace("SILENCE_SECONDS = 60.0", "SILENCE_SECONDS = 2.0"))
    program = "import time; print('started', __import__('os').getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-I", str(leash), sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as far:  # fmt: skip
        assert far.stdin is not None and far.stdout is not None and far.stderr is not None
        number = int(far.stdout.readline().split()[1])
        for _ in range(8):  # longer than it would wait for
            time.sleep(0.5)
            far.stdin.write(b".")
            far.stdin.flush()
            assert far.poll() is None and not is_gone(number)
        assert far.wait(20) == 1 and is_gone(number)
        assert b"heard nothing for 2 s" in far.stderr.read()
