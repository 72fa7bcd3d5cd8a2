"""Meeting: a slow rank is waited for, by a patience of its own; one that never comes ends the wait."""

from __future__ import annotations

import subprocess
import sys
import time

from r1mega.launch.ports import free_port

RANK = """
import os, sys, time
time.sleep(float(sys.argv[1]))
from datetime import timedelta
from r1mega.parallel.groups import _meet
store = _meet(int(os.environ["RANK"]), 2, timedelta(seconds=2))
store.set(os.environ["RANK"], "here")
print(store.get(str(1 - int(os.environ["RANK"]))).decode(), store.timeout.total_seconds())
if os.environ["RANK"] == "0":
    time.sleep(1)  # it holds the store
"""


def start(rank: int, port: int, delay: float, patience: str | None) -> subprocess.Popen[str]:
    import os

    env = {**os.environ, "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if patience is not None:
        env["R1MEGA_RENDEZVOUS_SECONDS"] = patience
    command = [sys.executable, "-c", RANK, str(delay)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_slow_rank_is_waited_for_longer_than_a_collective() -> None:
    port = free_port()
    ranks = [start(0, port, 0, "60"), start(1, port, 6, "60")]
    told = [rank.communicate(timeout=90) for rank in ranks]
    assert [out for out, _ in told] == ["here 2.0\n"] * 2, told


def test_a_rank_that_never_comes_ends_the_wait() -> None:
    began = time.monotonic()
    rank = start(0, free_port(), 0, "3")
    _, error = rank.communicate(timeout=60)
    assert rank.returncode != 0 and time.monotonic() - began < 45
    assert "1/2 clients joined" in error


def test_without_a_patience_of_its_own_the_collectives_limit_holds() -> None:
    rank = start(0, free_port(), 0, None)
    _, error = rank.communicate(timeout=60)
    assert rank.returncode != 0 and "1/2 clients joined" in error
