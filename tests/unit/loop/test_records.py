"""Numbers of a round and of an evaluation, worked out by hand."""

from __future__ import annotations

import pytest

from r1mega.loop import records
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score


def sample(index, num_tokens, accuracy, form=1.0, error=None, finish=FinishReason.stop):
    score = Score(accuracy + form, {"accuracy": accuracy, "format": form}, error=error)
    return Sample("p", index, [1] * num_tokens, [1] * num_tokens, [0.0] * num_tokens, finish, 0, score=score)


def group(*samples):
    return SampleGroup(Prompt("p", "q", "a"), list(samples))


def test_round_metrics_by_hand():
    groups = [
        group(sample(0, 2, 1.0), sample(1, 4, 0.0)),
        group(sample(0, 6, 1.0), sample(1, 8, 1.0, finish=FinishReason.length)),
    ]
    values = records.round_metrics(groups)
    assert values["reward/mean"] == pytest.approx((2 + 1 + 2 + 2) / 4)
    assert values["reward/accuracy"] == 0.75
    assert values["rollout/response_tokens"] == 5.0
    assert (values["rollout/response_tokens_min"], values["rollout/response_tokens_max"]) == (2.0, 8.0)
    assert values["rollout/response_tokens_std"] == pytest.approx(5**0.5)  # squares 9 1 1 9, mean 5
    assert values["rollout/truncated"] == 0.25
    assert values["reward/flat_groups"] == 0.5  # the second group's rewards are alike


def test_a_failed_reward_is_left_out_of_the_mean_and_counted():
    values = records.round_metrics([group(sample(0, 2, 1.0), sample(1, 2, 0.0, form=0.0, error="killed"))])
    assert values["reward/failed"] == 0.5
    assert values["reward/mean"] == 2.0


def test_evaluation_counts_a_failed_check_as_wrong():
    groups = [group(sample(0, 2, 1.0)), group(sample(0, 4, 0.0)), group(sample(0, 3, 1.0, error="killed"))]
    values = records.evaluation_metrics(groups)
    assert values["eval/pass_at_1"] == pytest.approx(1 / 3)
    assert values["eval/failed"] == pytest.approx(1 / 3)
    assert values["eval/response_tokens"] == 3.0
