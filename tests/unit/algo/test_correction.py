"""Truncated importance weights, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.algo.correction import corrected, importance_weights
from r1mega.algo.policy_loss import policy_loss

# anchor / rollout of probabilities: 0.5 / 0.25 = 2, 0.2 / 0.4 = 1/2, 0.9 / 0.1 = 9, 0.3 / 0.3 = 1.
ANCHOR = torch.tensor([0.5, 0.2, 0.9, 0.3]).log()
ROLLOUT = torch.tensor([0.25, 0.4, 0.1, 0.3]).log()


@pytest.mark.parametrize(("cap", "expected"), [(2.0, [2, 0.5, 2, 1]), (1.0, [1, 0.5, 1, 1]), (100.0, [2, 0.5, 9, 1])])
def test_by_hand(cap: float, expected: list[float]) -> None:
    assert importance_weights(ANCHOR, ROLLOUT, cap).tolist() == pytest.approx(expected, rel=1e-6)


def test_equal_log_probs_change_nothing() -> None:
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0])
    found, sums = corrected(advantages, torch.ones(4), ANCHOR, ANCHOR, cap=2.0)
    assert torch.equal(found, advantages)
    assert sums["correction"] == 4 and sums["correction_capped"] == 0


def test_far_apart_stays_finite() -> None:
    anchor, rollout = torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])
    assert importance_weights(anchor, rollout, 2.0).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_out_of_range(cap: float) -> None:
    with pytest.raises(ValueError, match="correction_cap: got"):
        importance_weights(ANCHOR, ROLLOUT, cap)


def test_the_surrogate_is_weighted_and_the_kl_term_is_not() -> None:
    """One update a round, ratio 1: the gradient of the surrogate is -w A c, that of k3 with reference r is w (1 - r/p).

    Weights 0.25 each but for the last token, which takes part in nothing; factors 2, 0.5, 2.
    """
    policy = ANCHOR.clone().requires_grad_()
    weights, advantages = torch.tensor([0.25, 0.25, 0.25, 0.0]), torch.tensor([1.0, -2.0, 3.0, 5.0])
    reference = ANCHOR - math.log(2)  # half as likely: 1 - r/p = 0.5
    scaled, sums = corrected(advantages, weights, policy, ROLLOUT, cap=2.0)
    loss, _ = policy_loss(policy, policy.detach(), reference, scaled, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1)
    loss.backward()
    kl = 0.1 * 0.25 * 0.5
    assert policy.grad is not None
    expected = [-0.25 * 1 * 2 + kl, 0.25 * 2 * 0.5 + kl, -0.25 * 3 * 2 + kl, 0.0]
    assert policy.grad.tolist() == pytest.approx(expected, rel=1e-5)
    # Of the three tokens that count: 2 + 0.5 + 2, two of them at the cap.
    assert float(sums["correction"]) == pytest.approx(4.5) and float(sums["correction_capped"]) == 2
