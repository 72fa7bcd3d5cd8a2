from __future__ import annotations

import math
import random

import pytest
import torch

from r1mega.algo.aggregation import token_weights
from r1mega.algo.packing import plan_batch
from r1mega.algo.policy_loss import mean_metrics, merge_metrics, policy_loss

R1 = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}


def loss_of_ratios(ratios, advantages, weights=None, **settings):
    """Anchor probability 1 / 100, policy probability ratio / 100."""
    policy = (torch.tensor(ratios, dtype=torch.double) / 100).log().requires_grad_()
    anchor = torch.full_like(policy, 0.01).log()
    weights = torch.ones_like(policy) if weights is None else torch.tensor(weights, dtype=torch.double)
    advantages = torch.tensor(advantages, dtype=torch.double)
    loss, metrics = policy_loss(policy, anchor, None, advantages, weights, **{**R1, **settings})
    loss.backward()
    return loss.item(), policy.grad.tolist(), mean_metrics(metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "term"),
    [
        # -min(r A, clip(r, 0.8, 1.2) A)
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # 1.2 x 2: too far up already
        (0.5, 2.0, -1.0),  # 0.5 x 2: the lower bound does not bind for a good sample
        (1.5, -2.0, 3.0),  # 1.5 x 2: nor the upper one for a bad sample
        (0.5, -2.0, 1.6),  # 0.8 x 2: too far down already
        (1.5, 0.0, 0.0),
    ],
)
def test_hand_worked_token(ratio, advantage, term):
    loss, gradient, metrics = loss_of_ratios([ratio], [advantage])
    assert loss == pytest.approx(term, rel=1e-12, abs=1e-15)
    clipped = term in (-2.4, 1.6)
    # d r / d log policy = r, so the gradient of an unclipped term is the term itself
    assert gradient[0] == pytest.approx(0.0 if clipped else term, rel=1e-12, abs=1e-15)


def test_clip_of_ten_is_the_interval_from_minus_nine_to_eleven():
    settings = {"clip_low": 10.0, "clip_high": 10.0}
    loss, gradient, metrics = loss_of_ratios([10.9, 11.1, 1e-4, 50.0], [1.0, 1.0, -1.0, -1.0], **settings)
    assert loss == pytest.approx(-10.9 - 11.0 + 1e-4 + 50.0)
    assert gradient == pytest.approx([-10.9, 0.0, 1e-4, 50.0])
    assert metrics["clip_fraction"] == 0.25
    # negative control: the usual 0.2 clips three of the four
    assert loss_of_ratios([10.9, 11.1, 1e-4, 50.0], [1.0, 1.0, -1.0, -1.0])[2]["clip_fraction"] == 0.75


def test_different_sides():
    loss, _, metrics = loss_of_ratios([1.3, 1.25, 0.7], [1.0, 1.0, -1.0], clip_high=0.28)
    assert loss == pytest.approx(-1.28 - 1.25 + 0.8)
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == pytest.approx((1 / 3, 1 / 3))


def test_dual_clip_bounds_a_bad_sample():
    loss, gradient, _ = loss_of_ratios([50.0, 2.0, 50.0], [-1.0, -1.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(3.0 + 2.0 - 1.2)
    assert gradient == pytest.approx([0.0, 2.0, 0.0])


def test_kl_term_hand_worked():
    # reference / policy = 2: k3 = 2 - log 2 - 1 = 0.306853; its gradient is 1 - 2 = -1. At ratio 1 the surrogate is -A.
    policy = torch.tensor([0.25], dtype=torch.double).log().requires_grad_()
    reference = torch.tensor([0.5], dtype=torch.double).log()
    advantages, weights = torch.tensor([3.0], dtype=torch.double), torch.tensor([0.5], dtype=torch.double)
    settings = {**R1, "kl_coef": 0.1}
    loss, metrics = policy_loss(policy, policy.detach(), reference, advantages, weights, **settings)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (-3.0 + 0.1 * (1 - math.log(2))))
    assert policy.grad.item() == pytest.approx(0.5 * (-3.0 + 0.1 * -1.0))
    means = mean_metrics(metrics)
    assert means["surrogate_loss"] == pytest.approx(-1.5)
    assert means["kl_loss"] == pytest.approx(0.05 * 0.306853, rel=1e-5)
    assert means["kl"] == means["kl_max"] == pytest.approx(0.306853, rel=1e-5)


def test_metrics_hand_worked():
    means = loss_of_ratios([0.5, 2.0, 1.0, 7.0], [1.0, 1.0, -1.0, 1.0], weights=[1.0, 1.0, 1.0, 0.0])[2]
    assert means["num_tokens"] == 3
    assert means["ratio"] == pytest.approx(3.5 / 3)
    assert (means["ratio_min"], means["ratio_max"]) == pytest.approx((0.5, 2.0))
    # exp(x) - x - 1 at log 0.5, log 2, 0: 0.193147, 0.306853, 0
    assert means["anchor_kl"] == pytest.approx(0.5 / 3, rel=1e-5)
    assert (means["clip_fraction_low"], means["clip_fraction_high"]) == pytest.approx((0.0, 1 / 3))


def test_a_token_of_weight_zero_takes_part_in_nothing():
    nan, inf = float("nan"), float("inf")
    policy = torch.tensor([-1.0, -inf, nan], requires_grad=True)
    anchor, reference = torch.tensor([-1.0, -inf, -2.0]), torch.tensor([-1.5, 0.0, nan])
    settings = {**R1, "kl_coef": 0.5}
    for ratio_level in ("token", "sequence"):
        policy.grad = None
        loss, metrics = policy_loss(
            policy,
            anchor,
            reference,
            torch.tensor([1.0, nan, inf]),
            torch.tensor([1.0, 0.0, 0.0]),
            ratio_level=ratio_level,
            sequence_ids_T=torch.tensor([0, 0, 1]),
            num_sequences=2,
            **settings,
        )
        loss.backward()
        alone = policy_loss(policy[:1], anchor[:1], reference[:1], torch.ones(1), torch.ones(1), **settings)
        assert torch.equal(loss, alone[0])
        assert mean_metrics(metrics) == mean_metrics(alone[1])
        assert policy.grad.tolist() == [pytest.approx(-1.0 + 0.5 * (1 - math.exp(-0.5))), 0.0, 0.0]


def test_an_enormous_ratio_that_is_clipped_has_gradient_zero():
    """exp(200) is infinite in fp32, and zero times infinity is not zero: a clip after the exponential gives nan."""
    policy = torch.tensor([0.0], requires_grad=True)
    anchor = torch.tensor([-200.0])
    one = torch.ones(1)
    loss, _ = policy_loss(policy, anchor, None, one, one, **R1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2) and policy.grad.item() == 0.0
    naive = torch.tensor([0.0], requires_grad=True)
    ratio = torch.exp(naive - anchor)
    torch.minimum(ratio, ratio.clamp(0.8, 1.2)).sum().backward()
    assert naive.grad.isnan()


def test_whole_output_ratio_hand_worked():
    # Sequence 0 has ratios 1.1 and 1.05 at its tokens: 1.155 as a whole, within 0.8 .. 1.2. Sequence 1 has 1.5 and 0.9:
    # 1.35 as a whole, clipped at 1.2. Reference / policy is 1 but for the first token of sequence 1, where it is 2.
    policy = torch.tensor([1.1, 1.05, 1.5, 0.9], dtype=torch.double).log().requires_grad_()
    reference = policy.detach() + torch.tensor([0, 0, math.log(2), 0], dtype=torch.double)
    weights = torch.tensor(token_weights([2, 2], "sequence_mean"), dtype=torch.double).repeat_interleave(2)
    arguments = (policy, torch.zeros_like(policy), reference, torch.full_like(policy, 2.0), weights)
    settings = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1}
    ids = torch.tensor([0, 0, 1, 1])
    loss, metrics = policy_loss(*arguments, ratio_level="sequence", sequence_ids_T=ids, num_sequences=2, **settings)
    loss.backward()
    k3 = 2 - math.log(2) - 1
    assert loss.item() == pytest.approx(0.5 * (-1.155 * 2) + 0.5 * (-1.2 * 2 + 0.1 * k3))
    # each token's log-prob moves its sequence's term: -0.5 x 2 x 1.155, and 0.5 x 0.1 x (1 - 2)
    assert policy.grad.tolist() == pytest.approx([-1.155, -1.155, -0.05, -0.05])
    assert mean_metrics(metrics)["ratio_max"] == pytest.approx(1.35)
    # negative control: by token, 1.1 and 1.05 and 1.5 -> 1.2 and 0.9
    by_token = policy_loss(*arguments, **settings)[0].item()
    assert by_token == pytest.approx(-0.25 * 2 * (1.1 + 1.05 + 1.2 + 0.9) + 0.25 * 0.1 * k3)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum", "constant"])
def test_the_loss_and_its_gradient_do_not_depend_on_the_packing(aggregation, ratio_level):
    rng = random.Random(5)
    torch.manual_seed(5)
    lengths = [rng.randint(1, 30) for _ in range(24)]
    logits = torch.randn(sum(lengths), dtype=torch.double)
    noise = 0.3 * torch.randn(2, sum(lengths), dtype=torch.double)
    advantages = torch.randn(len(lengths), dtype=torch.double)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]

    def run(chunks, weights_of_sequences):
        parameters = logits.clone().requires_grad_()
        total, parts = 0.0, []
        for chunk in chunks:
            tokens = torch.tensor([starts[i] + t for i in chunk for t in range(lengths[i])], dtype=torch.long)
            counts = torch.tensor([lengths[i] for i in chunk])
            picked = torch.tensor(chunk)
            weights = torch.tensor(weights_of_sequences(chunk), dtype=torch.double).repeat_interleave(counts)
            policy = -torch.nn.functional.softplus(parameters[tokens])
            anchor, reference = policy.detach() + noise[:, tokens]
            loss, metrics = policy_loss(
                policy,
                anchor,
                reference,
                advantages[picked].repeat_interleave(counts),
                weights,
                clip_low=0.2,
                clip_high=0.2,
                kl_coef=0.1,
                ratio_level=ratio_level,
                sequence_ids_T=torch.arange(len(chunk)).repeat_interleave(counts),
                num_sequences=len(chunk),
            )
            loss.backward()
            total += loss.item()
            parts.append(metrics)
        return total, parameters.grad, mean_metrics(merge_metrics(parts))

    everything = token_weights(lengths, aggregation, constant_length=30)
    whole = run([list(range(len(lengths)))], lambda chunk: [everything[i] for i in chunk])
    for dp, max_tokens in ((1, 64), (2, 64), (3, 40)):
        plan = plan_batch(lengths, dp=dp, max_tokens=max_tokens)
        chunks = [list(chunk) for rank in plan.chunks for chunk in rank if chunk]
        assert len(chunks) > 3
        packed = run(chunks, lambda chunk: [everything[i] for i in chunk])
        assert packed[0] == pytest.approx(whole[0], rel=1e-12)
        assert torch.allclose(packed[1], whole[1], rtol=1e-12, atol=0)
        assert packed[2] == pytest.approx(whole[2], rel=1e-12)
    # negative control: weights from the counts of each micro-batch, averaged over micro-batches, do depend on it
    if aggregation == "token_mean":
        local = run(
            chunks,
            lambda chunk: [weight / len(chunks) for weight in token_weights([lengths[i] for i in chunk], aggregation)],
        )
        assert abs(local[0] - whole[0]) > 1e-3 * abs(whole[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": -0.1}, "clip_low: got -0.1; must be >= 0"),
        ({"clip_high": float("nan")}, "clip_high: got nan"),
        ({"kl_coef": -1.0}, "kl_coef: got -1.0"),
        ({"kl_coef": 0.1}, "kl_coef: got 0.1 without reference log-probs"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0; must be above 1"),
        ({"ratio_level": "word"}, "ratio_level: got 'word'; must be one of token, sequence"),
        ({"ratio_level": "sequence"}, "without sequence_ids_T"),
    ],
)
def test_refuses_bad_settings(settings, message):
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        policy_loss(ones, ones, None, ones, ones, **{**R1, **settings})
