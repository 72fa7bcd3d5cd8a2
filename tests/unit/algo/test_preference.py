"""Losses of reward models by hand, and pairs that stay together."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.algo.packing import plan_pairs
from r1mega.algo.preference import pairwise_loss, pointwise_loss


def test_bradley_terry_by_hand():
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0], requires_grad=True)
    loss, sums = pairwise_loss(scores, 6)  # three of the batch's six pairs are in this micro-batch
    by_hand = [math.log(1 + math.exp(-margin)) for margin in (1.0, -3.0, 0.0)]
    assert loss.item() == pytest.approx(sum(by_hand) / 6)
    assert (sums["right"].item(), sums["margin"].item()) == (1.0, -2.0)
    loss.backward()
    pull = [1 / (1 + math.exp(margin)) / 6 for margin in (1.0, -3.0, 0.0)]
    assert scores.grad.tolist() == pytest.approx([-pull[0], pull[0], -pull[1], pull[1], -pull[2], pull[2]])


def test_point_wise_by_hand():
    scores, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    loss, sums = pointwise_loss(scores, labels, 3)
    chances = [1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(1.0)), 1 - 1 / (1 + math.exp(-0.5))]
    assert loss.item() == pytest.approx(-sum(map(math.log, chances)) / 3)
    assert (sums["right"].item(), sums["margin"].item()) == (1.0, 0.5)
    assert pointwise_loss(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 1.0]), 1)[0].isfinite()


@pytest.mark.parametrize(("dp", "multiple"), [(1, 1), (2, 1), (3, 2)])
def test_pairs_stay_together(dp, multiple):
    lengths = [5, 9, 30, 31, 2, 3, 40, 1, 7, 7, 12, 50, 8, 8]
    plan = plan_pairs(lengths, dp=dp, max_tokens=70, multiple_of_count=multiple)
    found = [index for rank in plan.chunks for chunk in rank for index in chunk]
    assert sorted(found) == list(range(len(lengths)))
    for rank in plan.chunks:
        assert len(rank) == plan.num_chunks and plan.num_chunks % multiple == 0
        for chunk in rank:
            assert sum(lengths[index] for index in chunk) <= 70
            assert all(left % 2 == 0 and right == left + 1 for left, right in zip(chunk[::2], chunk[1::2], strict=True))
    with pytest.raises(ValueError, match="must be pairs"):
        plan_pairs([1, 2, 3], dp=1, max_tokens=70)
