from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from rich.console import Console as RichConsole

from r1mega.metrics.console import Console
from r1mega.metrics.dashboard import RunState, render

RL = {
    "reward/mean": 0.8421,
    "eval/pass_at_1": 0.61,
    "rollout/response_tokens": 31.25,
    "train/kl": 0.00123,
    "train/grad_norm": float("nan"),
    "not/listed": 3.0,
}
PHASES = {"rollout": 3.0, "train": 1.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def state_of(clock: Clock, **kwargs: object) -> RunState:
    return RunState("demo", {"model": "tiny [bold]", "seed": "1"}, 60, clock=clock, **kwargs)


def drawn(state: RunState, width: int = 100, height: int = 40, ascii_only: bool = False) -> str:
    console = RichConsole(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(render(state, width, height, ascii_only))
    return console.file.getvalue()


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take this for a terminal
    out, clock = io.StringIO(), Clock()
    with Console("demo", 10, file=out, details={"layout": "tp2", "device": "cpu"}, clock=clock) as console:
        console.phase("rollout")
        clock.now = 4.0
        console.update(2, 1, RL, PHASES)
        console.message("saved checkpoint")
        clock.now = 20.0
        console.update(10, 5, {"train/loss": 0.5, "time/train": 2.0})
    assert out.getvalue().splitlines() == [
        "demo | layout tp2 | device cpu | 10 updates",
        "update 2/10 round 1 | reward 0.842 pass@1 61.0% len 31.2 kl 0.00123 gnorm nan | "
        "rollout 3.0s train 1.0s | 4.0s eta 16s",
        "saved checkpoint",
        "update 10/10 round 5 | loss 0.5000 | train 2.0s | 20s",
    ]


def test_disabled_writes_nothing() -> None:
    out = io.StringIO()
    with Console("demo", 10, enabled=False, file=out) as console:
        console.phase("train")
        console.update(1, 1, RL)
        console.message("hidden")
    assert out.getvalue() == ""


def test_a_log_in_a_poor_encoding_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with Console("démo", 1, file=out) as console:
        console.message("gewählt: 日")
    assert raw.getvalue() == b"d\\xe9mo | 1 updates\ngew\\xe4hlt: \\u65e5\n"


def test_display_shows_rl_values_first_and_now() -> None:
    clock = Clock()
    state = state_of(clock)
    state.record(0, 0, {"eval/pass_at_1": 0.25, "reward/mean": 0.1}, {})
    clock.now = 40.0
    state.record(4, 1, RL, PHASES)
    state.enter_phase("rollout")
    clock.now = 42.5
    text = drawn(state)
    assert re.search(r"held-out pass@1 +25\.0% +61\.0%", text)
    assert re.search(r"reward +0\.100 +0\.842", text)
    assert "update 4/60" in text
    assert "round 1" in text
    assert "rollout 2.5s" in text  # the phase in progress
    assert "9m18s left" in text  # 10 s an update, 56 to go, 2.5 s of it gone: 557.5 s
    assert "75%" in text  # rollout took 3 of 4 seconds
    assert "nan" in text
    assert "model tiny [bold]" in text  # no markup
    assert "█" in text  # the sparkline of the reward
    assert "loss" not in text  # not reported, not shown


def test_display_of_sft_shows_its_loss() -> None:
    state = state_of(Clock())
    for update, loss in ((1, 2.0), (2, 1.0)):
        state.record(update, 0, {"train/loss": loss, "train/lr": 1e-3, "perf/tokens_per_second": 9000}, {})
    text = drawn(state)
    assert "2.0000 to 1.0000" in text
    assert "9,000" in text
    assert "reward" not in text


@pytest.mark.parametrize(("width", "height"), [(160, 50), (100, 30), (80, 24), (60, 24), (40, 24)])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_display_fits_the_terminal(width: int, height: int, ascii_only: bool) -> None:
    from r1mega.metrics.catalog import CATALOG, PHASES

    state = state_of(Clock())
    for update in range(1, 50):
        state.record(update, update, dict.fromkeys(CATALOG, 1234.5678 * update), dict.fromkeys(PHASES, 3.3))
    state.enter_phase("inference")
    lines = drawn(state, width, height, ascii_only).splitlines()
    assert len(lines) < height  # the cursor stands on one more line
    assert max(map(len, lines)) <= width
    assert any("reward" in line for line in lines)


def test_resumed_run_does_not_count_the_updates_it_found() -> None:
    clock = Clock()
    state = state_of(clock, start_update=50)
    assert state.seconds_left() is None
    clock.now = 6.0
    state.record(52, 13, {}, {})
    assert state.seconds_left() == 24.0  # 3 s an update, 8 to go; counted from update 0 it would be 0.9 s


LIVE_PROGRAM = """
from r1mega.metrics.console import Console
with Console("demo", 2, details={"model": "tiny"}) as console:
    console.phase("rollout")
    console.update(1, 1, {"reward/mean": 0.25}, {"rollout": 1.0})
    console.message("saved [checkpoint]")
    print("from elsewhere")
    console.update(2, 1, {"reward/mean": 0.75}, {"rollout": 1.0})
console.close()
print("after")
"""


def run_in_terminal(program: str, **environment: str) -> str:
    """What `program` writes to a real pseudo-terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30", "PYTHONIOENCODING": "utf-8", **environment}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, stdin=slave, env=env)
    os.close(slave)
    output = b""
    while select.select([master], [], [], 30)[0]:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says so when the other side has closed
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    assert process.wait(timeout=30) == 0, output.decode()
    return output.decode()


def test_live_display_on_a_real_terminal() -> None:
    output = run_in_terminal(LIVE_PROGRAM)
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h") < output.index("after")  # cursor hidden, given back
    assert "saved [checkpoint]" in output
    assert "from elsewhere" in output
    last_frame = output[output.rindex("╭") :]
    assert "0.750" in last_frame
    assert "update 2/2" in last_frame


def test_dumb_terminal_gets_plain_lines() -> None:
    output = run_in_terminal(LIVE_PROGRAM, TERM="dumb")
    assert "\x1b" not in output
    assert "update 2/2 round 1 | reward 0.750" in output
