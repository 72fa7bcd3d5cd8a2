"""The probe looks at tokens of the weights published last, and at no others."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from r1mega.config import schema
from r1mega.loop import phases
from r1mega.metrics.timer import PhaseTimer
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, SamplingParams, Score, Span


def sample(logprobs: list[float], *spans: Span) -> Sample:
    count = len(logprobs)
    return Sample("p", 0, [1] * count, [1] * count, logprobs, FinishReason.stop, spans[-1].weight_version, spans=spans)


@pytest.fixture
def run() -> SimpleNamespace:
    config = schema.Config()
    config.rollout.probe = True
    return SimpleNamespace(config=config, log=SimpleNamespace(round_metrics={}), state=SimpleNamespace(update=4))


def test_only_tokens_of_the_last_weights_are_compared(run) -> None:
    old_and_new = sample([-1.0, -2.0, -3.0], Span(2, 0, 2), Span(4, 2, 3))
    new = sample([-1.0, -1.0], Span(4, 0, 2))
    trainer = [torch.tensor([-9.0, -9.0, -3.00005]), torch.tensor([-1.0, -1.0])]
    phases.measure_gap(run, [old_and_new, new], trainer)
    assert run.log.round_metrics["sync/logprob_gap_max"] == pytest.approx(5e-5, rel=0.01)
    assert run.log.round_metrics["sync/over"] == 0.0


def test_a_gap_is_found_and_the_sample_named(run) -> None:
    old = sample([-1.0], Span(2, 0, 1))
    mixed = sample([-1.0, -2.0], Span(2, 0, 1), Span(4, 1, 2))
    with pytest.raises(RuntimeError, match=r"by 1 on average and 1 at most \(sample 2 of the round\)"):
        phases.measure_gap(run, [old, old, mixed], [torch.tensor([-1.0])] * 2 + [torch.tensor([-1.0, -3.0])])


def test_a_round_without_such_tokens(run) -> None:
    phases.measure_gap(run, [sample([-1.0], Span(2, 0, 1))], [torch.tensor([-9.0])])
    assert run.log.round_metrics == {}


def a_run(update: int) -> SimpleNamespace:
    """A run at `update` whose rollouts and evaluations note what they are asked for."""
    config = schema.Config()
    config.rollout.max_tokens, config.rollout.max_tokens_from = 10, [[8, 20]]
    config.algo.updates, config.algo.updates_per_round = 16, 4
    noted: list[tuple[str, object]] = []

    def generate(*arguments: object, **_options: object) -> None:
        params = next(one for one in arguments if isinstance(one, SamplingParams))
        noted.append(("max_tokens", params.max_tokens))

    asks = SimpleNamespace(generate=generate, groups=lambda: [])
    return SimpleNamespace(
        config=config,
        state=SimpleNamespace(update=update, round=1, evaluated_at=0),
        timer=SimpleNamespace(phase=lambda _name: nullcontext()),
        turns=SimpleNamespace(engines=lambda: None),
        prompts=SimpleNamespace(at=lambda asked: noted.append(("prompts", asked))),
        rollouts=asks,
        collector=asks,
        held_out=["question"],
        log=SimpleNamespace(samples=lambda *_args, **_options: None, evaluation=lambda *_args: None),
        noted=noted,
    )


@pytest.mark.parametrize(("update", "tokens"), [(4, 10), (7, 10), (8, 20), (12, 20)])
def test_a_rollout_takes_the_values_of_its_first_update(update: int, tokens: int) -> None:
    run = a_run(update)
    phases.rollout(run)
    assert run.noted == [("prompts", update), ("max_tokens", tokens)]


def test_evaluations_are_as_long_as_rollouts_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.records, "evaluation_metrics", lambda _groups: {})
    for update, own, tokens in ((7, None, 10), (8, None, 20), (8, 5, 5)):
        run = a_run(update)
        run.config.evaluate.max_tokens = own
        phases.evaluate(run)
        assert run.noted == [("max_tokens", tokens)]


def scored(num_tokens: int, score: Score) -> Sample:
    return Sample("p", 0, [1] * num_tokens, [1] * num_tokens, [0.0] * num_tokens, FinishReason.stop, 4, score=score)


def rewarded(run: SimpleNamespace, *samples: Sample) -> list[SampleGroup]:
    groups = [SampleGroup(Prompt("p", "q", "a"), list(samples))]
    run.timer = PhaseTimer()
    run.rollouts = SimpleNamespace(groups=lambda: groups, metrics=dict)
    return phases.reward(run)


def test_the_length_counts_where_it_has_weight(run) -> None:
    run.config.rollout.max_tokens, run.config.reward.length_buffer = 10, 4
    assert rewarded(run, scored(8, Score(2.0)))[0].samples[0].reward == 2.0
    run.config.reward.length = 0.5
    assert rewarded(run, scored(8, Score(2.0)))[0].samples[0].reward == 2.0 - 0.5 * 0.5


def test_a_round_whose_rewards_fail_ends_the_run(run) -> None:
    failed = [scored(1, Score(0.0, error="no bwrap")), scored(1, Score(1.0))]
    run.config.reward.max_failed_share = 0.5
    rewarded(run, *failed)
    run.config.reward.max_failed_share = 0.4
    with pytest.raises(RuntimeError, match="reward.max_failed_share: got 0.4; .* 1 times: no bwrap"):
        rewarded(run, *failed)
