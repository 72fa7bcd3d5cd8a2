"""How a loop gets the groups of a round, on a group of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch.distributed as dist

from r1mega.data.prompts import PromptSource
from r1mega.rollout.buffer import Group
from r1mega.rollout.collector import Collector, Lockstep, Streamed
from r1mega.types import Completion, FinishReason, Prompt, Sample, SampleGroup, SamplingParams, Score

PROMPTS = [Prompt(str(n), f"q{n}", "a", (n,)) for n in range(10)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Engine:
    weight_version = 4

    def generate(self, requests, params, on_finished) -> None:
        for request in reversed(requests):
            for index in reversed(range(request.num_samples)):
                tokens = [*request.token_ids, index]
                on_finished(Completion(request.key, index, tokens, [0.0, 0.0], FinishReason.stop, 4))


def scored(_prompt: Prompt, text: str) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(Score(float(text)))
    return future


def lockstep(group: dist.ProcessGroup) -> Lockstep:
    collector = Collector(Engine(), 1, lambda tokens: "".join(map(str, tokens)), scored, group)
    return Lockstep(collector, PromptSource(PROMPTS, seed=0, shuffle=False), 3, 2)


def test_each_round_takes_the_next_questions_and_all_of_their_samples(alone) -> None:
    rollouts = lockstep(alone)
    for start in (0, 3):
        rollouts.generate(SamplingParams(), version=4)
        groups = rollouts.groups()
        assert [group.prompt.id for group in groups] == [str(n) for n in range(start, start + 3)]
        for number, group in enumerate(groups, start):
            assert [(s.index, s.reward) for s in group.samples] == [(i, float(f"{number}{i}")) for i in (0, 1)]
    cursor, pending = rollouts.snapshot()
    assert cursor["position"] == 6 and pending == [] and rollouts.metrics() == {}


def test_groups_of_another_kind_of_rollouts_are_not_lost_in_silence(alone) -> None:
    rollouts = lockstep(alone)
    rollouts.restore([])
    with pytest.raises(ValueError, match="the checkpoint holds 1 questions .* rollout.over_sampling"):
        rollouts.restore([SampleGroup(PROMPTS[0], [])])


class Rounds:
    """A producer of groups whose scores are still to come."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def round(self, count, params, version, *, is_last):
        self.asked.append((count, version, is_last))
        sample = Sample("1", 0, [1], [1], [0.0], FinishReason.stop, version)
        group = Group(0, PROMPTS[1], {}, finished={0: (sample, scored(PROMPTS[1], "7"))})
        return [group], {"rollout/used": 1.0}

    def snapshot(self):
        return {"position": 1}, [SampleGroup(PROMPTS[2], [])]


def test_streamed_rounds_are_scored_and_shared(alone) -> None:
    producer = Rounds()
    rollouts = Streamed(producer, 5, alone)
    rollouts.generate(SamplingParams(), version=4, is_last=True)
    (group,) = rollouts.groups()
    assert (group.prompt, group.samples[0].reward) == (PROMPTS[1], 7.0) and producer.asked == [(5, 4, True)]
    assert rollouts.metrics() == {"rollout/used": 1.0}
    assert rollouts.snapshot() == ({"position": 1}, [SampleGroup(PROMPTS[2], [])])


def test_a_rank_that_asks_nothing(alone) -> None:
    rollouts = Streamed(None, 5, alone)
    rollouts.generate(SamplingParams(), version=4)
    assert rollouts.groups() == [] and rollouts.metrics() == {} and rollouts.snapshot() == ({}, [])
    rollouts.restore([SampleGroup(PROMPTS[0], [])])
    rollouts.close()
