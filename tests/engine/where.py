"""Which device the real servers of a session's tests run on."""

from __future__ import annotations

import os

import pytest
import torch

# A GPU where there is one. R1MEGA_ENGINE_DEVICE says otherwise.
DEVICE = os.environ.get("R1MEGA_ENGINE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def need_gpus(count: int) -> None:
    """Skip what takes more processes on GPUs than there are: NCCL has no two ranks on one."""
    there = max(1, torch.cuda.device_count())
    if DEVICE == "cuda" and count > there:
        pytest.skip(f"needs {count} GPUs, here is {there}")


def only_on_cpu(why: str) -> None:
    """Skip what is only true of servers on a CPU."""
    if DEVICE != "cpu":
        pytest.skip(f"only on a CPU: {why}")
