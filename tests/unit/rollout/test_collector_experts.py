"""What the collector makes of an engine's completions, in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from r1mega.rollout import collector
from r1mega.rollout.collector import Collector
from r1mega.types import Completion, FinishReason, Prompt, SamplingParams


class Telling:
    """An engine that says of each sequence which experts it used."""

    weight_version = 0

    def generate(self, requests, params, on_finished):
        assert params.routed_experts
        for request in requests:
            for index in reversed(range(request.num_samples)):
                experts = torch.full((3, 1, 2), 10 * request.key + index, dtype=torch.uint8)
                found = Completion(
                    request.key, index, [7, 8], [-1.0, -1.0], FinishReason.stop, 0, routed_experts=experts
                )
                on_finished(found)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_experts_stay_with_their_samples_and_do_not_travel(group, monkeypatch) -> None:
    sent = []

    def gather(value, among):
        sent.extend(sample.routed_experts for _, sample in value)
        return [value]

    monkeypatch.setattr(collector, "gather", gather)
    made = Collector(Telling(), 1, lambda tokens: "", None, group)
    prompts = [Prompt(str(i), "q", "a", (1, 2)) for i in range(3)]
    made.generate(prompts, 2, SamplingParams(routed_experts=True), version=0, score=False)
    groups = made.groups()
    assert sent == [None] * 6
    found = [[int(sample.routed_experts[0, 0, 0]) for sample in group.samples] for group in groups]
    assert found == [[0, 1], [10, 11], [20, 21]]
