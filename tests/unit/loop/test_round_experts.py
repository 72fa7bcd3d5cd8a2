"""The record of a round that is replayed: the experts of each sample come back as they were."""

from __future__ import annotations

import pytest
import torch

from r1mega.loop import rounds
from r1mega.loop.rounds import RoundRecord, UpdateRecord
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup


def record(dtype: torch.dtype | None) -> RoundRecord:
    """Two groups with prompts and responses of different lengths."""

    def sample(index: int, num_prompt: int, num_tokens: int) -> Sample:
        experts = None if dtype is None else torch.randint(0, 256, (num_prompt + num_tokens - 1, 3, 2)).to(dtype)
        tokens = list(range(num_tokens))
        return Sample(
            "p", index, tokens, [1] * num_tokens, [-0.5] * num_tokens, FinishReason.stop, 4, routed_experts=experts
        )

    groups = [
        SampleGroup(Prompt("p", "q", "a", tuple(range(size))), [sample(index, size, 3 + index) for index in range(2)])
        for size in (2, 5)
    ]
    return RoundRecord(1, 4, 0, "1", groups, [UpdateRecord(5, 0.1, 1.0, "d")])


def experts_of(found: RoundRecord) -> list[torch.Tensor | None]:
    return [sample.routed_experts for group in found.groups for sample in group.samples]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_experts_come_back(tmp_path, dtype) -> None:
    written = record(dtype)
    rounds.write(tmp_path, written)
    found = rounds.read(tmp_path, 1, with_experts=True)
    assert found == written  # all but the experts, which do not count as equality
    for ours, theirs in zip(experts_of(found), experts_of(written), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert experts_of(rounds.read(tmp_path, 1)) == [None] * 4


def test_a_round_without_experts_cannot_be_replayed_with_them(tmp_path) -> None:
    rounds.write(tmp_path, record(None))
    assert experts_of(rounds.read(tmp_path, 1)) == [None] * 4
    with pytest.raises(ValueError, match="routed_experts"):
        rounds.read(tmp_path, 1, with_experts=True)
