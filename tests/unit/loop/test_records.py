"""Numbers of a round and of an evaluation, worked out by hand."""

from __future__ import annotations

import pytest

from r1mega.loop import records
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score, Span


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


def test_experts_replayed_by_hand():
    sums = {"expert_layers": 2.0, "expert_load_max": 3.0, "expert_load_sum": 5.0, "experts_idle": 0.5}
    assert records.expert_metrics(sums) == {"moe/load_max": 3.0, "moe/load_mean": 2.5, "moe/idle_experts": 0.25}
    found = records.expert_metrics(sums | {"replayed": 200.0, "replayed_otherwise": 3.0})
    assert found["moe/replay_disagreement"] == pytest.approx(0.015)


def test_staleness_by_hand():
    """Versions are counts of updates, four a round: six tokens one round behind, two of this one, two of three ago."""
    first, second, third = sample(0, 8, 1.0), sample(1, 2, 1.0), sample(2, 2, 1.0)
    first.spans = (Span(8, 0, 6), Span(12, 6, 8))
    second.spans = (Span(0, 0, 2),)
    third.spans = ()
    assert records.staleness([group(first, second), group(third)], 12, 4) == {
        "rollout/staleness_mean": pytest.approx((6 * 1 + 2 * 3) / 10),
        "rollout/staleness_max": 3.0,
    }


def test_the_correction_is_a_mean_over_tokens():
    means = {"kl": 0.0, "clip_fraction": 0.0, "ratio_max": 1.0, "anchor_kl": 0.0}
    sums = {"num_tokens": 4.0, "loss": 0.0, "entropy": 0.0}
    assert "train/correction" not in records.update_metrics(means, sums, grad_norm=0.0, lr=0.0)
    sums |= {"correction": 5.0, "correction_capped": 1.0}
    values = records.update_metrics(means, sums, grad_norm=0.0, lr=0.0)
    assert (values["train/correction"], values["train/correction_capped"]) == (1.25, 0.25)


def test_rewards_that_do_not_judge_every_question_by_hand():
    score = Score(1.0, {"format": 1.0, "language": 0.5})
    general = Sample("g", 0, [1], [1], [0.0], FinishReason.stop, 0, score=score)
    values = records.round_metrics([group(sample(0, 2, 1.0), sample(1, 4, 0.0)), group(general)])
    assert values["reward/accuracy"] == 0.5  # of the two that have it
    assert values["reward/format"] == 1.0
    assert values["reward/language"] == 0.5


def test_too_many_failed_rewards_end_the_run_with_the_reasons():
    groups = [group(sample(0, 2, 1.0), sample(1, 2, 0.0, error="killed")), group(sample(0, 2, 1.0), sample(1, 2, 0.0))]
    records.require_rewards(groups, 0.25)  # one of four
    with pytest.raises(
        RuntimeError, match=r"reward.max_failed_share: got 0.2; the reward of 1 of the round's 4 samples"
    ):
        records.require_rewards(groups, 0.2)
    groups[1].samples[1] = sample(1, 2, 0.0, error="killed")
    groups[1].samples[0] = sample(0, 2, 0.0, error="no bwrap")
    with pytest.raises(RuntimeError, match=r"3 of the round's 4 .* 2 times: killed; 1 times: no bwrap"):
        records.require_rewards(groups, 0.5)
