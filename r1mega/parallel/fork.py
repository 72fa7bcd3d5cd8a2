"""The ranks of one machine as forks of a process that has imported what they all need. No torch.

To import torch, Megatron-Core and transformers costs a rank some ten CPU seconds, which the ranks of a laptop take one
after another, and several hundred MB that forks share. A launcher therefore starts one process, which imports and then
calls `divide`. Not with CUDA: a process that has spoken to its driver cannot be forked.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
ORDER = "R1MEGA_FORK"  # the launcher's order: JSON of `launcher`, `report`, `log_dir` and `world_size`


def divide() -> None:
    """Return once in every rank of this machine, where the launcher asked for that; else at once, in the only one.

    A rank leads a process group of its own, has RANK and so on in its environment and its log as its output, and is the
    launcher's child by then: this process reports their numbers and ends, and the launcher adopts orphans meanwhile.
    """
    text = os.environ.pop(ORDER, None)
    if text is None:
        return
    order = json.loads(text)
    sys.stdout.flush()
    sys.stderr.flush()
    may_go, go = os.pipe()
    common, pids = os.getpid(), []
    for rank in range(order["world_size"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.close(go)
            os.close(order["report"])
            _become(rank, order, may_go, common)
            return
        os.setpgid(pid, pid)  # here too: whoever reads the report may signal the group at once
        pids.append(pid)
    os.write(order["report"], json.dumps(pids).encode())
    os.write(go, bytes(len(pids)))
    os._exit(0)


def _become(rank: int, order: dict, may_go: int, common: int) -> None:
    """Be the rank once the launcher knows of it and the process in common is gone. Ends where it is not to know."""
    reported = os.read(may_go, 1)
    os.close(may_go)
    while reported and os.getppid() == common:
        time.sleep(0.001)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NAME, f"rank{rank}".encode())  # what ps and top tell them apart by
    if not reported or os.getppid() != order["launcher"]:
        os._exit(1)
    with (Path(order["log_dir"]) / f"rank{rank}.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
        if rank != 0:
            os.dup2(log.fileno(), 1)
    os.environ.update(numbers(rank, order["world_size"]))


def numbers(rank: int, world_size: int) -> dict[str, str]:
    """What torch.distributed reads in the environment of a rank on one machine."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in found.items()}
