from __future__ import annotations

import pytest

from r1mega.metrics.timer import PhaseTimer, as_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_per_round_and_totals() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for name, seconds in (("rollout", 2.0), ("train", 3.0), ("rollout", 0.5)):
        with timer.phase(name):
            clock.now += seconds
        clock.now += 10  # between phases: nobody's time
    assert timer.finish_round() == {"rollout": 2.5, "train": 3.0}
    with timer.phase("train"):
        clock.now += 4.0
    timer.add("reward", 1.25)
    assert timer.totals == {"rollout": 2.5, "train": 7.0, "reward": 1.25}
    assert as_metrics(timer.finish_round()) == {"time/train": 4.0, "time/reward": 1.25}
    assert timer.finish_round() == {}


def test_nesting_is_refused_and_leaves_the_outer_phase_whole() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("rollout"):
        clock.now += 1
        with pytest.raises(RuntimeError, match="'reward' cannot start inside phase 'rollout'"), timer.phase("reward"):
            clock.now += 100
        with pytest.raises(RuntimeError, match="cannot end inside phase 'rollout'"):
            timer.finish_round()
        clock.now += 1
    assert timer.finish_round() == {"rollout": 2.0}


def test_a_phase_that_raises_is_charged_and_left() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(KeyError), timer.phase("train"):
        clock.now += 2
        raise KeyError
    with timer.phase("publish"):
        clock.now += 1
    assert timer.finish_round() == {"train": 2.0, "publish": 1.0}


def test_the_display_is_told_and_queued_work_is_waited_for() -> None:
    clock = Clock()
    seen: list[str | None] = []
    queued = [0.0]

    def synchronize() -> None:
        clock.now += queued[0]
        queued[0] = 0.0

    timer = PhaseTimer(on_phase=seen.append, synchronize=synchronize, clock=clock)
    queued[0] = 5.0  # belongs to whatever came before
    with timer.phase("train"):
        queued[0] = 3.0
    with timer.phase("publish"):
        pass
    assert timer.finish_round() == {"train": 3.0, "publish": 0.0}
    assert seen == ["train", None, "publish", None]
