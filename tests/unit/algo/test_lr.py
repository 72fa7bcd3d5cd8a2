from __future__ import annotations

import math

import pytest

from r1mega.algo.lr import learning_rate


def rates(num=None, **settings):
    return [learning_rate(update, **settings) for update in range(num or settings["total_updates"])]


def test_constant_with_warmup():
    assert rates(lr=3e-6, warmup_updates=3, total_updates=5) == pytest.approx([1e-6, 2e-6, 3e-6, 3e-6, 3e-6])


def test_linear_reaches_the_minimum_at_the_last_update():
    # after 2 of warm-up, 5 updates: 1.0 down to 0.2 in steps of 0.2
    got = rates(lr=1.0, min_lr=0.2, schedule="linear", warmup_updates=2, total_updates=7)
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_hand_worked():
    # p = 0, 1/4, 1/2, 3/4, 1: (1 + cos(pi p)) / 2 = 1, 0.853553, 0.5, 0.146447, 0; times 0.9 plus 0.1
    got = rates(lr=1.0, min_lr=0.1, schedule="cosine", total_updates=5)
    assert got == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_stays_at_the_minimum_past_the_end(schedule):
    assert learning_rate(99, lr=1.0, min_lr=0.25, schedule=schedule, total_updates=10) == 0.25


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (1, 2), (2, 2)])
def test_shortest_runs_are_finite_and_in_range(schedule, warmup, total):
    for rate in rates(lr=1.0, min_lr=0.5, schedule=schedule, warmup_updates=warmup, total_updates=total):
        assert math.isfinite(rate) and 0 < rate <= 1.0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"schedule": "step"}, "schedule"),
        ({"min_lr": 2.0}, "min_lr"),
        ({"min_lr": -0.1}, "min_lr"),
        ({"warmup_updates": 11}, "warmup_updates"),
    ],
)
def test_refuses_contradictions(settings, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        learning_rate(0, **{"lr": 1.0, "total_updates": 10, **settings})
