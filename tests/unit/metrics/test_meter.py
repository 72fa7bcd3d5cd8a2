from __future__ import annotations

import math
import pickle

import pytest

from r1mega.metrics.meter import Meter, Reduction


def test_mean_of_unequal_micro_batches_is_the_mean_over_samples() -> None:
    meter = Meter()
    meter.add("reward/mean", 1.0, weight=3)  # three samples of mean 1
    meter.add("reward/mean", 0.2, weight=5)  # five samples of mean 0.2
    assert meter.flush()["reward/mean"] == pytest.approx((3 * 1.0 + 5 * 0.2) / 8)  # 0.5, not the plain mean 0.6


def test_each_reduction() -> None:
    meter = Meter()
    for value, weight in ((4.0, 1.0), (-2.0, 2.0), (3.0, 1.0)):
        for reduction in Reduction:
            meter.add(reduction, value, weight, reduction=reduction)
    assert meter.flush() == {"mean": 0.75, "sum": 3.0, "min": -2.0, "max": 4.0}


def test_flush_keeps_the_order_and_empties() -> None:
    meter = Meter()
    meter.add("b", 1)
    meter.add("a", 2)
    meter.add("b", 3)
    assert list(meter.flush().items()) == [("b", 2.0), ("a", 2.0)]
    assert meter.flush() == {}
    meter.add("b", 7, reduction="max")  # a new start, also for the reduction
    assert meter.flush() == {"b": 7.0}


def test_weight_zero_says_nothing_even_of_nan() -> None:
    meter = Meter()
    meter.add("train/kl", math.nan, weight=0)
    assert meter.flush() == {}
    meter.add("train/kl", math.nan, weight=0)
    meter.add("train/kl", 2.0)
    assert meter.flush() == {"train/kl": 2.0}


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_nan_is_not_hidden_by_its_place(reduction: Reduction, values: tuple[float, float]) -> None:
    meter = Meter()
    for value in values:
        meter.add("train/loss", value, reduction=reduction)
    assert math.isnan(meter.flush()["train/loss"])


def test_merge_equals_adding_in_one_place() -> None:
    first, second, whole = Meter(), Meter(), Meter()
    for meter, values in ((first, [(1.0, 2.0), (5.0, 1.0)]), (second, [(9.0, 4.0)])):
        for value, weight in values:
            for target in (meter, whole):
                target.add("mean", value, weight)
                target.add("max", value, reduction="max")
    first.merge(pickle.loads(pickle.dumps(second)))
    assert first.flush() == pytest.approx(whole.flush())
    assert second.flush() == {"mean": 9.0, "max": 9.0}  # untouched by the merge


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="train/kl: weight"):
        Meter().add("train/kl", 1.0, weight=weight)


def test_one_name_one_reduction() -> None:
    meter = Meter()
    meter.add("x", 1.0)
    with pytest.raises(ValueError, match="x was added as mean and now as max"):
        meter.add("x", 1.0, reduction="max")
    with pytest.raises(ValueError, match="median"):
        meter.add("y", 1.0, reduction="median")
