from __future__ import annotations

import math

import pytest
import torch

from r1mega.algo.kl import k1, k2, k3


def test_hand_worked_values():
    policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    # log(policy / reference) = log 2, -log 2
    assert k1(policy, reference).tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    # 0.693147^2 / 2 = 0.240227 both ways
    assert k2(policy, reference).tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    # 1/2 - log(1/2) - 1 = 0.193147 and 2 - log 2 - 1 = 0.306853
    assert k3(policy, reference).tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


def test_k1_and_k3_average_to_the_divergence():
    """Over all tokens, weighted by the policy, k1 and k3 give KL(policy || reference) exactly; k2 does not."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.double)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    divergence = 0.7 * math.log(0.7 / 0.2) + 0.2 * math.log(0.2 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    means = [float((policy * estimate(policy.log(), reference.log())).sum()) for estimate in (k1, k2, k3)]
    assert means[0] == pytest.approx(divergence, rel=1e-12)
    assert means[2] == pytest.approx(divergence, rel=1e-12)
    assert abs(means[1] - divergence) > 0.01


def test_k3_keeps_its_digits_for_nearly_equal_logprobs():
    """k3 of a difference d = 2^-13 is d^2/2 + d^3/6 + ... = 7.4510e-9; exp(d) - d - 1 in fp32 has no digit of it."""
    difference = torch.tensor([2.0**-13])
    exact = math.expm1(2.0**-13) - 2.0**-13
    assert float(k3(torch.zeros(1), difference)) == pytest.approx(exact, rel=2e-3)
    naive = float(difference.exp() - difference - 1)
    assert abs(naive - exact) > 0.5 * exact


def test_k3_gradient_is_one_minus_the_ratio():
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.double, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.double)
    k3(policy, reference).sum().backward()
    assert policy.grad.tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(1.0), 0.0])
