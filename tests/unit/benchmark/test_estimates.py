"""pass@k, cons@k and intervals, against numbers worked out by hand."""

from __future__ import annotations

import itertools
from statistics import mean

import numpy as np
import pytest

from r1mega.benchmark.estimates import (
    bootstrap,
    cluster,
    cons_at_k,
    consensus,
    pass_at_k,
    quantile,
    student_interval,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (10, 3, 5, 11 / 12),  # 1 - C(7,5)/C(10,5) = 1 - 21/252
        (4, 0, 4, 0.0),
        (4, 3, 2, 1.0),
    ],
)
def test_pass_at_k(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_mean_over_all_draws_of_k(k: int) -> None:
    rights = [1, 0, 0, 1, 0, 0]
    draws = [any(rights[i] for i in chosen) for chosen in itertools.combinations(range(6), k)]
    assert pass_at_k(6, 2, k) == pytest.approx(mean(draws))
    assert pass_at_k(6, 2, 3) != pytest.approx(1 - (1 - 2 / 6) ** 3)  # the estimate that is biased


def test_pass_at_k_of_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"pass@5 cannot be had from 4 samples"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="5 right ones of 4"):
        pass_at_k(4, 5, 1)


def test_equal_answers_are_one_class_however_they_are_written() -> None:
    value = {"1/2": 0.5, "0.5": 0.5, r"\frac{1}{2}": 0.5, "2": 2.0, "2.0": 2.0}
    asked = []

    def same(first: str, second: str) -> bool:
        asked.append((first, second))
        return value[first] == value[second]

    answers = ["1/2", "2", None, "0.5", "1/2", "2.0", r"\frac{1}{2}"]
    assert cluster(answers, same) == [0, 1, None, 0, 0, 1, 0]
    assert ("1/2", "1/2") not in asked and len(asked) == 5  # 2; 0.5; 2.0 (twice); \frac
    assert cluster(answers, lambda a, b: False) == [0, 1, None, 2, 0, 3, 4]  # by text alone: what would be wrong


def test_the_majority_decides() -> None:
    # Three say 0 (right), two say 1, one says nothing.
    assert consensus([0, 1, 0, None, 1, 0], [1, 0, 1, 0, 0, 1]) == 1.0
    # The right answer is given most rarely: pass@1 is 1/3, the majority wrong.
    assert consensus([0, 1, 1], [1, 0, 0]) == 0.0
    # Two lead, of which one is right.
    assert consensus([0, 1, 1, 0, 2], [0, 1, 1, 0, 0]) == 0.5
    assert consensus([None, None], [0, 0]) == 0.0


def test_cons_at_k_is_the_mean_over_groups_of_k() -> None:
    classes, scores = [0, 0, 1, 1, 1, 0, 2], [1, 1, 0, 0, 0, 1, 0]
    # {0,0,1}: right. {1,1,0}: wrong. The seventh is left over.
    assert cons_at_k(classes, scores, 3) == 0.5
    assert cons_at_k(classes, scores, 7) == 0.5  # three say 0, three say 1
    assert cons_at_k(classes, scores, 1) == pytest.approx(3 / 7)
    with pytest.raises(ValueError, match="cons@8"):
        cons_at_k(classes, scores, 8)


def test_the_interval_is_the_seeds_and_about_the_size_it_should_be() -> None:
    values = [1.0] * 60 + [0.0] * 40
    low, high = bootstrap(values, 2000, 7)
    assert (low, high) == bootstrap(values, 2000, 7)
    # Normal approximation: 0.6 +- 1.96 * sqrt(0.6 * 0.4 / 100) = 0.504 .. 0.696
    assert low == pytest.approx(0.504, abs=0.015)
    assert high == pytest.approx(0.696, abs=0.015)
    assert bootstrap([0.25, 0.25], 10, 0) == (0.25, 0.25)
    spread = [i / 100 for i in range(100)]
    assert bootstrap(spread, 50, 7) != bootstrap(spread, 50, 8)


def test_the_interval_of_a_few_values() -> None:
    # Student 1908, Table IX (sleep, Hyoscyamine less Laevo-hyoscyamine): mean 1.58, s 1.2300, n 10; t of 9 is 2.2622.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    low, high = student_interval(gained)
    assert (low, high) == pytest.approx((0.7001, 2.4599), abs=1e-3)
    assert student_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least two"):
        student_interval([1.0])


def test_the_interval_of_three_holds_the_mean_as_often_as_it_says() -> None:
    draw = np.random.Generator(np.random.Philox(0))
    samples = draw.normal(size=(2000, 3))
    held = [low < 0 < high for low, high in map(student_interval, samples)]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.015)  # three standard errors
    ranges = [low < 0 < high for low, high in (bootstrap(one, 200, 0) for one in samples[:500])]
    assert sum(ranges) / len(ranges) < 0.85  # why the bootstrap is not asked: 0.75, as 1 - 2 / 2 ** 3


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([5, 1, 3, 2], share) for share in (0.1, 0.5, 0.75, 1.0)] == [1, 2, 3, 5]
