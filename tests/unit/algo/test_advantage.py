from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.algo.advantage import group_advantages


def test_hand_worked_group():
    # rewards 2 0 0 2: mean 1, population variance 1, so the advantages are the centred rewards
    assert group_advantages([2.0, 0.0, 0.0, 2.0], [4], eps=0.0).tolist() == [1.0, -1.0, -1.0, 1.0]
    # 1 0 0 0: mean 0.25, variance (0.75^2 + 3 x 0.25^2) / 4 = 0.1875, std 0.4330127
    # 0.75 / 0.4330127 = 1.7320508 and -0.25 / 0.4330127 = -0.5773503
    got = group_advantages([1.0, 0.0, 0.0, 0.0], [4], eps=0.0).tolist()
    assert got == pytest.approx([1.7320508, -0.5773503, -0.5773503, -0.5773503], rel=1e-6)
    # negative control: with the sample standard deviation the first would be 0.75 / 0.5 = 1.5
    assert abs(got[0] - 1.5) > 0.2


def test_without_std_it_only_centres():
    got = group_advantages([1.0, 0.0, 0.0, 0.0], [4], normalise_std=False).tolist()
    assert got == [0.75, -0.25, -0.25, -0.25]


def test_groups_of_different_sizes_do_not_mix():
    together = group_advantages([1.0, 0.0, 5.0, 1.0, 3.0], [2, 3])
    apart = torch.cat([group_advantages([1.0, 0.0], [2]), group_advantages([5.0, 1.0, 3.0], [3])])
    assert torch.equal(together, apart)
    assert not torch.allclose(together, group_advantages([1.0, 0.0, 5.0, 1.0, 3.0], [5]))


def test_equal_rewards_give_exactly_zero_even_without_eps():
    # 0.1 + 0.1 + 0.1 = 0.30000000000000004 in fp64: the mean is not the reward, yet no advantage may come of it
    assert (0.1 + 0.1 + 0.1) / 3 != 0.1
    assert group_advantages([0.1, 0.1, 0.1], [3], eps=0.0).tolist() == [0.0, 0.0, 0.0]
    assert group_advantages([7.0], [1], eps=0.0).tolist() == [0.0]


def test_rounding_differences_do_not_become_advantages():
    # the two sums are one rounding apart and mean the same reward
    assert 0.1 + 0.2 != 0.3
    assert group_advantages([0.1 + 0.2, 0.3], [2]).abs().max() < 1e-9
    assert group_advantages([0.1 + 0.2, 0.3], [2], eps=0.0).abs().max() > 0.5


def test_failed_samples_take_no_part():
    rewards, valid = [1.0, float("nan"), 0.0, 100.0], [True, False, True, False]
    # of the valid 1 and 0: mean 0.5, std 0.5
    assert group_advantages(rewards, [4], valid_S=valid, eps=0.0).tolist() == [1.0, 0.0, -1.0, 0.0]
    assert group_advantages(rewards, [4], valid_S=[False] * 4).tolist() == [0.0] * 4
    assert group_advantages(rewards, [4], valid_S=[False, False, True, False]).tolist() == [0.0] * 4


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.2, 1.0, 1.2, 2.0]), min_size=1, max_size=16), min_size=1, max_size=5))
def test_every_group_has_mean_zero_and_std_one_or_is_zero(groups):
    advantages = group_advantages([r for group in groups for r in group], [len(group) for group in groups])
    for group, part in zip(groups, advantages.split([len(group) for group in groups]), strict=True):
        if len(set(group)) == 1:
            assert not part.any()
        else:
            assert abs(float(part.mean())) < 1e-6
            assert float(part.std(correction=0)) == pytest.approx(1.0, abs=1e-4)  # eps 1e-6 on a std of 0.05 or more
            assert sorted(range(len(group)), key=lambda i: group[i]) == sorted(
                range(len(group)), key=lambda i: float(part[i])
            )


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="group_sizes: got 2 groups of 3 samples in all"):
        group_advantages([1.0, 0.0], [1, 2])
    with pytest.raises(ValueError, match=r"rewards\[1\]: got nan"):
        group_advantages([1.0, float("nan")], [2])
