"""Programs that attack are ended within their limits, score 0 and leave nothing; honest ones beside them score 1."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hostile_programs as hostile

from r1mega.reward import sandbox as sandboxes
from r1mega.reward.code import COMPILE_SECONDS, CodeLimits, code_passes
from r1mega.reward.sandbox import File, Limits, SandboxError, open_sandbox
from r1mega.types import Prompt, Score

SECONDS = 1.0
MEMORY_MIB = 256
LIMITS = CodeLimits(test_seconds=SECONDS, total_seconds=3 * SECONDS, memory_mib=MEMORY_MIB)
SLACK = 4.0  # of a machine that is busy with other things; a program that is not ended takes 1,000 s
TESTS = ({"input": "SECRET-INPUT\n", "output": hostile.EXPECTED},)
ADD = ({"input": "1 2\n", "output": "3\n"}, {"input": "-5 7\n", "output": "2\n"})
PLACES = ("/tmp", "/dev/shm", "/usr", "/usr/bin", "/var/tmp", "/root", ".")
# What `make test` runs of each list; R1MEGA_EXTENDED=1 runs all of it.
QUICK = {
    "endless loop deaf to signals", "fork bomb", "10 GB over children", "endless output", "reads the tests",
    "writes to /tmp", "a link to outside", "a connection", "kills its parent", "a sleeping child left behind",
    "a child that holds its output", "inherited descriptors", "shared memory that outlives processes",
}  # fmt: skip


def cases(programs: dict[str, str], quick: set[str]) -> list:
    return [
        pytest.param(source, id=name, marks=[] if name in quick else pytest.mark.extended)
        for name, source in programs.items()
    ]


@pytest.fixture(scope="module", autouse=True)
def bubblewrap() -> None:
    try:
        open_sandbox("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))


def judged(tag: str, source: str, tests: tuple = TESTS, limits: CodeLimits = LIMITS) -> Score:
    prompt = Prompt("p", "q", "", domain="code", tests=tests)
    return code_passes(prompt, f"<think> x </think> <answer>\n```{tag}\n{source}\n```\n</answer>", limits)


def boxed_processes() -> set[int]:
    """Processes of the user that programs run as, and bwrap's."""
    found = set()
    for process in psutil.process_iter(["uids", "name"]):
        uids = process.info["uids"]
        if process.info["name"] == "bwrap" or (uids and uids.real == 65534):
            found.add(process.pid)
    return found


def marked_files() -> set[Path]:
    return {path for place in PLACES if Path(place).is_dir() for path in Path(place).glob(f"*{hostile.MARK}*")}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    processes, children = boxed_processes(), {child.pid for child in psutil.Process().children(recursive=True)}
    folders = set(Path("/tmp").glob("r1mega-box-*"))
    yield
    deadline = time.monotonic() + SLACK
    while boxed_processes() - processes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert boxed_processes() <= processes
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children
    assert marked_files() == set()
    assert set(Path("/tmp").glob("r1mega-box-*")) <= folders


def check_hostile(tag: str, source: str, seconds: float) -> None:
    began = time.monotonic()
    score = judged(tag, source)
    assert time.monotonic() - began < seconds + SLACK
    assert score.value == 0.0
    assert score.reason
    assert score.error is None
    assert hostile.EXPECTED not in score.reason


@pytest.mark.parametrize("source", cases(hostile.PYTHON, QUICK))
def test_hostile_python(source: str, nothing_left: None) -> None:
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as abstract:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        abstract.bind(f"\0{hostile.MARK}")
        abstract.listen()
        check_hostile("python", source.replace("PORT", str(listening.getsockname()[1])), SECONDS)


@pytest.mark.parametrize("source", cases(hostile.CPP, {"reads a file while compiling"}))
def test_hostile_cpp(source: str, nothing_left: None) -> None:
    check_hostile("cpp", source, COMPILE_SECONDS + SECONDS)


@pytest.mark.parametrize("source", cases(hostile.JAVASCRIPT, {"a sleeping child"}))
def test_hostile_javascript(source: str, nothing_left: None) -> None:
    check_hostile("javascript", source, SECONDS)


def test_there_are_forty_of_them() -> None:
    assert len(hostile.PYTHON) + len(hostile.CPP) + len(hostile.JAVASCRIPT) >= 40


@pytest.mark.extended
def test_an_honest_program_beside_hostile_ones_passes(nothing_left: None) -> None:
    """Each attack runs while an honest program does, which must not notice."""
    honest = "a, b = map(int, input().split())\nprint(a + b)"
    generous = CodeLimits(test_seconds=30.0, total_seconds=60.0)
    for source in hostile.PYTHON.values():
        with ThreadPoolExecutor(2) as both:
            attack = both.submit(judged, "python", source)
            assert both.submit(judged, "python", honest, ADD, generous).result() == Score(1.0), source
            assert attack.result().value == 0.0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: pass", "test 1 of 1: no end within 1 s"),
        ("x = bytearray(10 << 30)", "test 1 of 1: ended with status 1 MemoryError"),
        ("while True: print('y' * 1000)", "test 1 of 1: more than 4194304 bytes of output"),
        ("print(1)", "test 1 of 1: wrong output"),
    ],
)
def test_the_reason_names_the_limit(source: str, reason: str) -> None:
    assert judged("python", source).reason == reason


def test_the_tests_of_one_program_share_a_limit() -> None:
    tests = ({"input": "", "output": "1"},) * 9
    limits = CodeLimits(test_seconds=5.0, total_seconds=1.5)
    began = time.monotonic()
    score = judged("python", "import time\ntime.sleep(0.6)\nprint(1)", tests, limits)
    assert time.monotonic() - began < 1.5 + SLACK
    assert score.value == 0.0
    assert "no time left of 1.5 s" in score.reason or "no end within" in score.reason


def test_children_share_a_limit_of_memory() -> None:
    """Each stays below the limit, all together do not."""
    source = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = b'x' * (100 << 20)\n"
        "        time.sleep(1000)\ntime.sleep(1000)"
    )
    limits = CodeLimits(test_seconds=20.0, total_seconds=20.0, memory_mib=MEMORY_MIB)
    assert judged("python", source, TESTS, limits).reason == "test 1 of 1: more than 256 MiB of memory"


def test_a_killed_worker_takes_its_program_along(nothing_left: None) -> None:
    program = """
from r1mega.reward.code import CodeLimits, code_passes
from r1mega.types import Prompt
prompt = Prompt("p", "q", "", domain="code", tests=({"input": "", "output": "1"},))
print("up", flush=True)
code_passes(prompt, "```python\\nimport time\\ntime.sleep(1000)\\n```", CodeLimits(1000, 1000))
"""
    before = boxed_processes()
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "up\n"
    deadline = time.monotonic() + 30
    while len(boxed_processes() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert boxed_processes() - before
    worker.kill()
    worker.wait(10)
    worker.stdout.close()


def test_a_missing_bubblewrap_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    open_sandbox.cache_clear()
    try:
        score = judged("python", "print(1)")
    finally:
        open_sandbox.cache_clear()
    assert score.value == 0.0
    assert "apt-get install bubblewrap" in score.error
    assert "unsafe_rlimits" in score.error


def test_a_machine_without_namespaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = ["--unshare-all", "--no-such-option"]
    monkeypatch.setattr(sandboxes, "_namespaces", lambda limits: refusing)
    open_sandbox.cache_clear()
    try:
        with pytest.raises(SandboxError, match=r"does not work on this machine .*no-such-option.*user namespaces"):
            open_sandbox("bubblewrap")
    finally:
        open_sandbox.cache_clear()


def test_an_unknown_sandbox() -> None:
    with pytest.raises(SandboxError, match=r"reward.sandbox: got 'none'; must be bubblewrap or unsafe_rlimits"):
        open_sandbox("none")


def test_the_weaker_mode_has_limits_and_says_what_it_is(nothing_left: None) -> None:
    limits = CodeLimits(1.0, 5.0, MEMORY_MIB, "unsafe_rlimits")
    honest = "a, b = map(int, input().split())\nprint(a + b)"
    assert judged("python", honest, ADD, limits) == Score(1.0)
    for name in ("endless loop", "a sleeping child left behind", "fork bomb", "10 GB at once", "endless output"):
        assert judged("python", hostile.PYTHON[name], TESTS, limits).value == 0.0, name


@pytest.mark.parametrize(
    "name", ["reads /etc/passwd", "abstract sockets of this machine", "a connection to this machine",
             "reads the command lines and memories of others", "memory files"],
)  # fmt: skip
def test_attacks_succeed_where_only_limits_hold(name: str) -> None:
    """The control of the tests above: these attacks are attacks. And why nobody gets the weaker mode unasked."""
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as abstract:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        abstract.bind(f"\0{hostile.MARK}")
        abstract.listen()
        source = hostile.PYTHON[name].replace("PORT", str(listening.getsockname()[1]))
        assert judged("python", source, TESTS, CodeLimits(5.0, 5.0, 4096, "unsafe_rlimits")).value == 1.0


def test_files_of_one_run_are_gone_in_the_next() -> None:
    box = open_sandbox("bubblewrap")
    files = {"main.py": File(b"import os\nprint(sorted(os.listdir('.')))\nopen('left', 'w').write('x')")}
    for _ in range(2):
        outcome = box.run(["/usr/bin/python3", "-I", "main.py"], b"", files, Limits(seconds=10))
        assert outcome.stdout == b"['main.py']\n", outcome
