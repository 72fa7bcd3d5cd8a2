"""The log-prob probe: rounding passes, other weights do not."""

from __future__ import annotations

import pytest
import torch

from r1mega.weights.verify import logprob_gap, require_agreement


def gap_of(differences, tolerance=1e-4):
    zeros = [torch.zeros(len(values)) for values in differences]
    return logprob_gap([torch.tensor(values) for values in differences], zeros, tolerance)


def test_gap_by_hand():
    gap = gap_of([[0.0, 0.5], [1.0, 0.1, 0.4]], tolerance=0.4)
    assert gap.mean == pytest.approx(2.0 / 5)
    assert gap.max == 1.0
    assert gap.worst_sample == 1
    assert gap.over == pytest.approx(2 / 5)


def test_rounding_passes_and_so_does_one_near_tie():
    require_agreement(gap_of([[1e-6] * 1000]), 1e-4, 0.002, version=3)
    require_agreement(gap_of([[1e-6] * 1000 + [0.05]]), 1e-4, 0.002, version=3)


@pytest.mark.parametrize(
    "differences",
    [[[2e-4] * 10], [[0.0] * 99 + [1e-3]], [[float("nan")] + [0.0] * 10_000], [[1e-3] * 5 + [0.0] * 995]],
)
def test_other_weights_do_not(differences):
    with pytest.raises(RuntimeError, match="not generating with the trainer's weights"):
        require_agreement(gap_of(differences), 1e-4, 0.002, version=3)
