from __future__ import annotations

import os
import subprocess
import sys

import psutil
import torch

from r1mega.parallel.memory import figures, resident

HOLD = "import sys; held = bytearray(80_000_000); held[::4096] = b'1' * len(held[::4096]); print(); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"


def test_what_children_hold_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        alone = psutil.Process(process.pid).memory_info().rss
        assert resident(process.pid) - alone > 80e6
        found = figures(torch.device("cpu"), lambda: [process.pid])
        assert found["engines_rss"] * 1e9 > 80e6
        process.stdin.close()
    assert resident(process.pid) == 0


def test_of_this_process() -> None:
    before = figures(torch.device("cpu"))
    assert set(before) == {"rss"} and 0.01 < before["rss"] < psutil.virtual_memory().total / 1e9
    held = torch.ones(25_000_000)
    assert figures(torch.device("cpu"))["rss"] - before["rss"] > 0.08
    assert held.numel() and resident(os.getpid()) >= psutil.Process().memory_info().rss * 0.9
