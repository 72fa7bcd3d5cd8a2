"""Estimates of KL(policy || reference) from tokens that the policy sampled.

Shape suffixes: T tokens (or sequences, where the log-probs are those of whole sequences).

With d = log reference - log policy at the sampled token, each estimate has the same expectation or nearly so and a
different variance (http://joschu.net/blog/kl-approx.html):

    k1 = -d                 unbiased, often negative
    k2 = d^2 / 2            biased, small variance
    k3 = exp(d) - d - 1     unbiased, never negative; the one of DeepSeek-R1, Eq. 2

All are exact: nothing is clamped, so k3 is infinite from d = 88.8 on in fp32. `policy_loss` reports the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(policy_logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """log policy - log reference, [T]."""
    return policy_logprobs_T - reference_logprobs_T


def k2(policy_logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """Half the squared difference of the log-probs, [T]."""
    return (policy_logprobs_T - reference_logprobs_T).square() / 2


def k3(policy_logprobs_T: Tensor, reference_logprobs_T: Tensor) -> Tensor:
    """reference / policy - log(reference / policy) - 1, [T] (DeepSeek-R1, Eq. 2).

    The gradient with respect to the policy's log-prob is 1 - reference / policy.
    """
    difference_T = reference_logprobs_T - policy_logprobs_T
    # expm1 keeps the digits that exp(d) - 1 loses: at d = 1e-4 k3 is 5e-9, and one fp32 rounding of exp(d) is 6e-8.
    return torch.expm1(difference_T) - difference_T
