"""Learning-rate schedules as a function of the update number."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    update: int,
    *,
    lr: float,
    min_lr: float = 0.0,
    schedule: str = "constant",
    warmup_updates: int = 0,
    total_updates: int,
) -> float:
    """The learning rate of one update.

    Warm-up rises linearly: update 0 has lr / warmup_updates, update warmup_updates - 1 has lr. After it `constant`
    stays at lr; `linear` and `cosine` start at lr and reach min_lr at the last update. With p from 0 to 1 over the
    updates after warm-up, cosine is min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2.

    Args:
        update: counts from 0.
        lr: the highest learning rate.
        min_lr: the lowest after warm-up; unused by `constant`.
        schedule: one of SCHEDULES.
        warmup_updates: updates of the linear rise, 0 for none.
        total_updates: updates of the whole run, warm-up included.

    Raises:
        ValueError: an unknown schedule, or numbers that contradict each other.
    """
    _check(lr, min_lr, schedule, warmup_updates, total_updates)
    assert update >= 0, update
    if update < warmup_updates:
        return lr * (update + 1) / warmup_updates
    if schedule == "constant":
        return lr
    progress = min(1.0, (update - warmup_updates) / max(1, total_updates - 1 - warmup_updates))
    share = 1.0 - progress if schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return min_lr + (lr - min_lr) * share


def _check(lr: float, min_lr: float, schedule: str, warmup_updates: int, total_updates: int) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: got {schedule!r}; must be one of {', '.join(SCHEDULES)}")
    if not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr: got {min_lr}; must be from 0 to lr = {lr}; lower it")
    if not 0 <= warmup_updates <= total_updates:
        raise ValueError(
            f"warmup_updates: got {warmup_updates}; must be from 0 to the run's {total_updates} updates; lower it"
        )
