from __future__ import annotations

import pytest

from r1mega.algo.aggregation import AGGREGATIONS, token_weights

COUNTS = [4, 1, 0, 5]  # three sequences with loss tokens, ten tokens


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [1 / 12, 1 / 3, 0.0, 1 / 15]),
        ("token_mean", [0.1, 0.1, 0.0, 0.1]),
        ("sequence_sum", [1 / 3, 1 / 3, 0.0, 1 / 3]),
        ("constant", [1 / 24, 1 / 24, 0.0, 1 / 24]),  # L = 8
    ],
)
def test_hand_worked_weights(aggregation, expected):
    assert token_weights(COUNTS, aggregation, constant_length=8) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_means_have_total_weight_one(aggregation):
    weights = token_weights(COUNTS, aggregation)
    assert sum(weight * count for weight, count in zip(weights, COUNTS, strict=True)) == pytest.approx(1.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_update_without_loss_tokens_has_no_weight(aggregation):
    assert token_weights([0, 0], aggregation, constant_length=8) == [0.0, 0.0]


def test_refuses_an_unknown_aggregation_and_a_missing_constant():
    with pytest.raises(ValueError, match="aggregation: got 'mean'.*sequence_mean"):
        token_weights(COUNTS, "mean")
    with pytest.raises(ValueError, match="constant_length: got None"):
        token_weights(COUNTS, "constant")
