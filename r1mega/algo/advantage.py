"""Group-relative advantages.

Shape suffixes: S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(
    rewards_S: Tensor | Sequence[float],
    group_sizes: Sequence[int],
    *,
    valid_S: Tensor | Sequence[bool] | None = None,
    normalise_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r) within each group (DeepSeek-R1, Eq. 3).

    The paper does not say which standard deviation it means. This is the population's, sqrt(mean((r - mean(r))^2)): a
    group is all the samples there are of its question, and it stays defined for a group of one. The sample form would
    make every advantage sqrt((G - 1) / G) times as large (0.968 for G = 16).

    Args:
        rewards_S: one reward a sample, the groups one after another.
        group_sizes: samples in each group; they add up to S and may differ.
        valid_S: False marks a sample whose reward means nothing (it failed). It takes no part in mean and std, and its
            advantage is zero. None: all are valid.
        normalise_std: False leaves the division out, as Dr.GRPO does (arXiv 2503.20783).
        eps: added to std, so that rounding differences between equal rewards do not become advantages of one.

    Returns:
        [S], fp32, on the device of the rewards. A group whose valid rewards are all equal, or that has none, gives
        exactly zero.

    Raises:
        ValueError: the sizes do not add up to S, or a valid reward is not finite.
    """
    rewards_S = torch.as_tensor(rewards_S, dtype=torch.double)
    valid_S = torch.ones_like(rewards_S, dtype=torch.bool) if valid_S is None else torch.as_tensor(valid_S).bool()
    _check(rewards_S, valid_S, group_sizes)
    sizes_G = torch.tensor(list(group_sizes), dtype=torch.long, device=rewards_S.device)
    group_S = torch.repeat_interleave(torch.arange(len(group_sizes), device=rewards_S.device), sizes_G)

    def group_sum(values_S: Tensor) -> Tensor:
        return torch.zeros(len(group_sizes), dtype=torch.double, device=values_S.device).index_add(0, group_S, values_S)

    # Equal rewards are told apart from nearly equal ones before any rounding: the mean of three times 0.1 is not 0.1.
    low_G = rewards_S.new_full((len(group_sizes),), torch.inf).scatter_reduce(
        0, group_S, rewards_S.masked_fill(~valid_S, torch.inf), "amin"
    )
    high_G = rewards_S.new_full((len(group_sizes),), -torch.inf).scatter_reduce(
        0, group_S, rewards_S.masked_fill(~valid_S, -torch.inf), "amax"
    )
    differs_S = (low_G < high_G)[group_S] & valid_S

    num_valid_G = group_sum(valid_S.double()).clamp(min=1)
    mean_G = group_sum(rewards_S.masked_fill(~valid_S, 0)) / num_valid_G
    centred_S = (rewards_S - mean_G[group_S]).masked_fill(~differs_S, 0)
    if normalise_std:
        std_G = (group_sum(centred_S**2) / num_valid_G).sqrt()
        centred_S = centred_S / (std_G[group_S] + eps)
    return centred_S.masked_fill(~differs_S, 0).float()


def _check(rewards_S: Tensor, valid_S: Tensor, group_sizes: Sequence[int]) -> None:
    assert rewards_S.dim() == 1 and valid_S.shape == rewards_S.shape, (rewards_S.shape, valid_S.shape)
    if sum(group_sizes) != len(rewards_S) or any(size < 0 for size in group_sizes):
        raise ValueError(
            f"group_sizes: got {len(group_sizes)} groups of {sum(group_sizes)} samples in all; "
            f"must add up to the {len(rewards_S)} rewards; pass the size of every group, in order"
        )
    broken_S = valid_S & ~torch.isfinite(rewards_S)
    if broken_S.any():
        index = int(broken_S.nonzero()[0])
        raise ValueError(
            f"rewards[{index}]: got {float(rewards_S[index])}; must be finite; "
            "mark a sample whose reward failed as not valid"
        )
