"""How much memory this process, its device and the processes of engines hold now, in GB (1e9 bytes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch

_GB = 1e9


def figures(device: torch.device, engines: Callable[[], Sequence[int]] | None = None) -> dict[str, float]:
    """What is held, by name.

    On CUDA: `allocated` and `reserved` by torch in this process, `device_used` by all processes of the device (engines
    that share it included), `peak` of allocated since the last call. On a CPU: `rss`, the resident memory of this
    process. `engines_rss` is the resident memory of the engines' processes, shared pages counted in each.

    Args:
        engines: process ids of engines on this machine, whose children count as well; None on a rank that knows none.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found = {
            "allocated": torch.cuda.memory_allocated(device) / _GB,
            "reserved": torch.cuda.memory_reserved(device) / _GB,
            "device_used": (total - free) / _GB,
            "peak": torch.cuda.max_memory_allocated(device) / _GB,
        }
        torch.cuda.reset_peak_memory_stats(device)
    else:
        found = {"rss": psutil.Process().memory_info().rss / _GB}
    if engines is not None:
        found["engines_rss"] = sum(resident(number) for number in engines()) / _GB
    return found


def resident(number: int) -> int:
    """Resident bytes of a process and of all that it started; 0 of one that has ended."""
    try:
        process = psutil.Process(number)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for one in family:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # ended meanwhile
    return total
