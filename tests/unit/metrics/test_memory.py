from __future__ import annotations

import pytest

from r1mega.metrics.memory import PhaseMemory, largest
from r1mega.metrics.timer import PhaseTimer


def test_before_the_first_start_and_after_the_last_end() -> None:
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    memory = PhaseMemory(lambda: {"rss": next(values)})
    timer = PhaseTimer(memory)
    for phase in ("rollout", "train", "train"):
        with timer.phase(phase):
            pass
    assert memory.finish_round() == {
        "memory/rollout/rss_before": 1.0, "memory/rollout/rss_after": 2.0,
        "memory/train/rss_before": 3.0, "memory/train/rss_after": 6.0,
    }  # fmt: skip
    with pytest.raises(ValueError), timer.phase("train"):
        raise ValueError
    assert memory.finish_round() == {"memory/train/rss_before": 7.0, "memory/train/rss_after": 8.0}


def test_the_peak_is_that_of_the_phase() -> None:
    peaks = iter([90.0, 5.0, 80.0, 4.0])  # what was between phases counts for none
    memory = PhaseMemory(lambda: {"allocated": 1.0, "peak": next(peaks)})
    for phase in ("train", None, "train", None):
        memory(phase)
    assert memory.finish_round() == {
        "memory/train/allocated_before": 1.0, "memory/train/allocated_after": 1.0, "memory/train/peak": 5.0
    }  # fmt: skip


def test_the_largest_of_all_ranks() -> None:
    assert largest([{"a": 1.0, "engines": 9.0}, {"a": 2.0}]) == {"a": 2.0, "engines": 9.0}
