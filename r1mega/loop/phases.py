"""The phases of a round: rollout, reward, inference, train, publish; and evaluation between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from r1mega.algo.advantage import group_advantages
from r1mega.algo.aggregation import token_weights
from r1mega.algo.correction import corrected
from r1mega.algo.packing import split_updates
from r1mega.algo.policy_loss import mean_metrics, policy_loss
from r1mega.loop import records, rounds
from r1mega.loop.delivery import deliver
from r1mega.loop.rounds import RoundRecord, UpdateRecord
from r1mega.loop.wire import REFERENCE, RlRun
from r1mega.metrics.memory import largest
from r1mega.parallel.collectives import gather
from r1mega.parallel.seed import derive
from r1mega.train import routes
from r1mega.train.batch import MicroBatch, PackItem
from r1mega.types import Sample, SampleGroup, SamplingParams
from r1mega.weights import verify


@dataclass
class RoundBatch:
    """The samples of a round, one entry each, with all that the loss needs. The same on every rank."""

    samples: list[Sample]
    items: list[PackItem]  # of the policy: with the experts the engine chose, where these are replayed
    advantages: list[float]
    valid: list[bool]  # False: the reward failed, the sample is left out of the loss
    anchor: list[torch.Tensor] | None  # None: one update a round, whose own log-probs are the anchor
    reference: list[torch.Tensor] | None  # None: kl_coef is 0
    rollout: list[torch.Tensor]  # the engine's own, as it generated


def begin(run: RlRun) -> None:
    """Keep the reference, publish, evaluate; a resumed run has its reference and its first evaluation behind it."""
    if run.is_resumed:
        publish(run)
        return
    run.policy.keep_copy(REFERENCE)
    publish(run)
    evaluate(run)


def rollout(run: RlRun) -> None:
    """Sample a group of responses to each of the round's questions. Scoring goes on beside it."""
    config, state = run.config, run.state
    params = SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_tokens=config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
        seed=derive(config.run.seed, "rollout", state.round),
        routed_experts=config.rollout.router_replay,
    )
    is_last = state.update + config.algo.updates_per_round >= config.algo.updates
    with run.timer.phase("rollout"):
        run.turns.engines()
        run.prompts.begin(state.update)
        run.rollouts.generate(params, version=state.update, is_last=is_last)


def reward(run: RlRun) -> list[SampleGroup]:
    """Wait for the scores that the rollout left open; bring the groups to every rank."""
    with run.timer.phase("reward"):
        groups = run.rollouts.groups()
    per_round = run.config.algo.updates_per_round
    run.log.round_metrics |= run.rollouts.metrics() | records.staleness(groups, run.state.update, per_round)
    return groups


def inference(run: RlRun, groups: list[SampleGroup]) -> RoundBatch:
    """Anchor and reference log-probs, and the advantages (DeepSeek-R1, Eq. 3)."""
    algo = run.config.algo
    samples = [sample for group in groups for sample in group.samples]
    items = [
        PackItem((*group.prompt.token_ids, *sample.token_ids), len(sample.token_ids))
        for group in groups
        for sample in group.samples
    ]
    valid = [sample.score is not None and sample.score.error is None for sample in samples]
    advantages = group_advantages(
        [sample.reward for sample in samples],
        [len(group.samples) for group in groups],
        valid_S=valid,
        normalise_std=algo.advantage_std,
    )
    anchor = reference = None
    with run.timer.phase("inference"), torch.no_grad():
        run.turns.trainer()
        plan = run.policy.plan(items, algo.max_tokens_per_micro_batch)
        given = items
        if run.config.rollout.router_replay:
            given = routes.deal(items, [sample.routed_experts for sample in samples], run.fields, run.groups)
        if algo.updates_per_round > 1:
            anchor = run.policy.logprobs(given, plan)
            measure_gap(run, samples, anchor)
        if algo.kl_coef > 0:
            # It chooses its experts itself: its weights are not those that the engine chose with.
            with run.policy.weights(REFERENCE):
                reference = run.policy.logprobs(items, plan)
    engine = [torch.tensor(sample.rollout_logprobs) for sample in samples]
    return RoundBatch(samples, given, advantages.tolist(), valid, anchor, reference, engine)


def measure_gap(run: RlRun, samples: Sequence[Sample], trainer: Sequence[torch.Tensor]) -> None:
    """The engine's log-probs of its samples against the trainer's at the start of the round, before any update.

    Only of tokens generated under the weights published last: others are those of another policy.
    """
    rollout = run.config.rollout
    found = [
        (i, torch.tensor(sample.rollout_logprobs[span.start : span.end]), trainer[i][span.start : span.end])
        for i, sample in enumerate(samples)
        for span in sample.spans
        if span.weight_version == run.state.update
    ]
    if not found:
        return
    numbers, engine, ours = zip(*found, strict=True)
    gap = verify.logprob_gap(engine, ours, rollout.probe_tolerance)
    gap = replace(gap, worst_sample=numbers[gap.worst_sample])
    run.log.round_metrics |= {"sync/logprob_gap_mean": gap.mean, "sync/logprob_gap_max": gap.max, "sync/over": gap.over}
    if rollout.probe:
        verify.require_agreement(gap, rollout.probe_tolerance, rollout.probe_outliers, version=run.state.update)


def split_round(run: RlRun, batch: RoundBatch) -> list[list[int]]:
    """Indices of the samples of each update of the round: a random split of all of them."""
    seed = derive(run.config.run.seed, "split", run.state.round)
    return split_updates(len(batch.samples), run.config.algo.updates_per_round, seed=seed)


def update(run: RlRun, batch: RoundBatch, samples: list[int]) -> None:
    """One optimizer step on these samples of the round (DeepSeek-R1, Eq. 1 and 2)."""
    config, policy = run.config, run.policy
    algo = config.algo
    items = [batch.items[i] for i in samples]
    lengths = [item.num_response if batch.valid[i] else 0 for i, item in zip(samples, items, strict=True)]
    constant = config.rollout.max_tokens if algo.aggregation == "constant" else None
    weights = token_weights(lengths, algo.aggregation, constant_length=constant)
    own: dict[int, torch.Tensor] = {}

    def loss(logprobs_R: torch.Tensor, entropy_R: torch.Tensor, micro: MicroBatch):
        def spread(values: list[float]) -> torch.Tensor:
            """One value a sample -> one a response token."""
            per_sample = torch.tensor([values[i] for i in micro.samples], device=logprobs_R.device)
            return per_sample[micro.sequence_R]

        def of_tokens(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([values[samples[i]] for i in micro.samples]).to(logprobs_R.device)

        anchor_R = logprobs_R.detach() if batch.anchor is None else of_tokens(batch.anchor)
        if batch.anchor is None:
            own.update(zip(micro.samples, logprobs_R.detach().cpu().split(micro.num_responses), strict=True))
        weights_R = spread(weights)
        advantages_R = spread([batch.advantages[i] for i in samples])
        factors = {}
        if algo.correction_cap > 0:
            rollout_R = of_tokens(batch.rollout)
            advantages_R, factors = corrected(advantages_R, weights_R, anchor_R, rollout_R, cap=algo.correction_cap)
        value, metrics = policy_loss(
            logprobs_R,
            anchor_R,
            None if batch.reference is None else of_tokens(batch.reference),
            advantages_R,
            weights_R,
            clip_low=algo.clip_low,
            clip_high=algo.clip_high,
            kl_coef=algo.kl_coef,
            ratio_level=algo.ratio_level,
            sequence_ids_T=micro.sequence_R,
            num_sequences=len(micro.samples),
        )
        metrics["entropy"] = torch.where(weights_R != 0, entropy_R, 0.0).sum()
        metrics["loss"] = value.detach()
        return value, metrics | factors

    lr = run.learning_rate(algo.updates)
    num_tokens = max(1, sum(lengths))
    with run.timer.phase("train"):
        plan = policy.plan(items, algo.max_tokens_per_micro_batch)
        sums = policy.forward_backward(items, plan, loss, mtp_weight=run.mtp_weight(num_tokens))
        if batch.anchor is None:
            trainer = policy.collect_samples(items, own)
            measure_gap(run, [batch.samples[i] for i in samples], trainer)
        grad_norm = policy.optimizer_step(lr)
    run.state.update += 1
    digest = policy.digest() if config.logger.rounds else ""
    run.updates.append(UpdateRecord(run.state.update, sums["loss"], grad_norm, digest))
    run.log.update(run.state, records.update_metrics(mean_metrics(sums), sums, grad_norm=grad_norm, lr=lr))


def is_refresh_due(run: RlRun) -> bool:
    """Whether the reference becomes the latest policy now: every `algo.reference_refresh` updates."""
    every = run.config.algo.reference_refresh
    return every > 0 and run.state.update % every == 0


def publish(run: RlRun) -> None:
    """Bring the policy's weights to every engine, resharded into Hugging Face tensors; the version is the update
    count. It is then the engines' turn."""
    with run.timer.phase("publish"):
        run.log.round_metrics |= deliver(run)


def is_evaluation_due(run: RlRun) -> bool:
    """Whether `evaluate.every` updates have passed since the last evaluation, or the run is at its end."""
    every, state = run.config.evaluate.every, run.state
    if state.update >= run.config.algo.updates:
        return True
    return every > 0 and state.update // every > state.evaluated_at // every


def evaluate(run: RlRun) -> None:
    """pass@1 on the held-out questions: the share of right answers, one sample each."""
    config, state = run.config, run.state
    state.evaluated_at = state.update
    if not run.held_out:
        return
    params = SamplingParams(
        temperature=config.evaluate.temperature,
        top_p=config.evaluate.top_p,
        max_tokens=config.evaluate.max_tokens or config.rollout.max_tokens,
        stop=tuple(config.rollout.stop),
        # One seed for every evaluation: a change between two of them comes from the weights.
        seed=derive(config.run.seed, "evaluate"),
    )
    with run.timer.phase("evaluate"):
        run.turns.engines()
        run.collector.generate(run.held_out, 1, params, version=state.update)
        groups = run.collector.groups()
    run.log.samples(state, groups, split="eval", limit=config.logger.samples_per_round)
    run.log.evaluation(state, records.evaluation_metrics(groups))


def close_round(run: RlRun, groups: list[SampleGroup], batch: RoundBatch) -> None:
    """Write what the round was: rewards, lengths, phase times, tokens per second, and some samples; export where
    due."""
    seconds = run.timer.finish_round()
    run.log.round_metrics |= largest(gather(run.memory.finish_round(), run.groups.control))
    run.log.samples(run.state, groups, split="train", limit=run.config.logger.samples_per_round)
    run.log.close_round(
        run.state, records.round_metrics(groups), seconds, sum(len(item.tokens) for item in batch.items)
    )
    record_round(run, groups)
    every = run.config.export.every
    if every > 0 and run.state.update // every > run.state.exported_at // every:
        run.turns.both()
        run.state.exported_at = run.state.update
        run.export(f"hf-{run.state.update:06d}")
    run.checkpoints.poll()
    if run.checkpoints.is_due(run.state):
        run.turns.both()
        cursor, pending = run.rollouts.snapshot()
        run.checkpoints.save(run.state, cursor, run.log, pending)


def record_round(run: RlRun, groups: list[SampleGroup]) -> None:
    """Write the round's samples and what its updates gave, so that `r1mega replay` can do them again."""
    if run.config.logger.rounds and run.groups.rank == 0:
        version = run.updates[0].update - 1
        record = RoundRecord(run.state.round, version, run.config.run.seed, str(run.layout), groups, list(run.updates))
        rounds.write(run.config.run.dir, record, keep=run.config.logger.keep_rounds)
    run.updates.clear()


def finish(run: RlRun) -> None:
    """Export the final policy, draw the curves, write the summary."""
    if run.config.export.hf:
        run.turns.both()
        run.export("hf")
    run.log.finish(run.state)
