"""Which device the tests' real servers run on."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def need_gpus(count: int) -> None:
    """Skip what has more processes of servers than there are GPUs: each takes one of its own."""
    if DEVICE == "cuda" and count > torch.cuda.device_count():
        pytest.skip(f"needs {count} GPUs, here is {torch.cuda.device_count()}")


def only_on_cpu(why: str) -> None:
    """Skip what is only true of servers on a CPU."""
    if DEVICE != "cpu":
        pytest.skip(f"only on a CPU: {why}")
