"""Training of a reward model: a score for each response, from pairs (helpful) or from labels (safety).

DeepSeek-R1, section 3.1: the helpful model is trained on pairs with a pairwise loss, the safety model point-wise on
safe and unsafe responses, both with batches of 256, a learning rate of 6e-6, for one epoch, up to 8,192 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1mega.algo.preference import pairwise_loss, pointwise_loss
from r1mega.config.choices import DataFormat
from r1mega.config.schema import Config
from r1mega.data.preference import PreferenceExample
from r1mega.loop import supervised
from r1mega.loop.records import expert_metrics
from r1mega.loop.wire_supervised import RewardModelRun, wire_reward_model
from r1mega.train.batch import MicroBatch, PackItem
from r1mega.train.reward_model import MegatronRewardModel, ScoreLoss


def main(config: Config) -> None:
    """Run one rank of the training that `config` describes, to the exported checkpoint."""
    with wire_reward_model(config) as run:
        train(run)


def train(run: RewardModelRun) -> None:
    """See every row `reward_model.epochs` times, `reward_model.batch_size` an update."""
    config, state = run.config, run.state
    batch_size, total = config.reward_model.batch_size, run.num_examples * config.reward_model.epochs
    if not run.is_resumed:
        evaluate(run)
    while state.update < run.updates:
        with run.timer.phase("train"):
            count = min(batch_size, total - state.update * batch_size)
            examples = run.examples.next(count)
            metrics = step(run, examples)
        supervised.close_update(run, metrics, sum(example.num_tokens for example in examples))
        if is_evaluation_due(run):
            evaluate(run)
        supervised.keep(run)
    supervised.finish(run)


def step(run: RewardModelRun, examples: Sequence[PreferenceExample]) -> dict[str, float]:
    """One optimizer step on the mean loss of the batch's pairs, or of its labelled responses."""
    lr = run.learning_rate(run.updates)
    items = pack(examples)
    model = run.policy
    sums = model.forward_backward(items, plan(run, items), loss_of(run, examples))
    grad_norm = model.optimizer_step(lr)
    metrics = {f"train/{name}": value for name, value in means(sums, len(examples)).items()}
    return metrics | {"train/grad_norm": grad_norm, "train/lr": lr} | expert_metrics(sums)


def pack(examples: Sequence[PreferenceExample]) -> list[PackItem]:
    """The sequences as the model takes them, the two of a pair next to each other."""
    return [PackItem(one.token_ids, sum(one.loss_mask)) for example in examples for one in example.sequences]


def plan(run: RewardModelRun, items: list[PackItem]):
    """Which sequences go into which micro-batch; a pair stays together, as its loss takes both scores."""
    model, limit = run.policy, run.config.reward_model.max_tokens_per_micro_batch
    assert isinstance(model, MegatronRewardModel)
    return (model.plan_pairs if run.config.data.format is DataFormat.pairs else model.plan)(items, limit)


def loss_of(run: RewardModelRun, examples: Sequence[PreferenceExample]) -> ScoreLoss:
    """The loss of one micro-batch, its share of the mean over the examples."""
    if run.config.data.format is DataFormat.pairs:
        return lambda scores_S, _micro: pairwise_loss(scores_S, len(examples))

    def pointwise(scores_S: torch.Tensor, micro: MicroBatch):
        labels_S = torch.tensor([examples[i].label for i in micro.samples], device=scores_S.device)
        return pointwise_loss(scores_S, labels_S, len(examples))

    return pointwise


def means(sums: dict[str, float], count: int) -> dict[str, float]:
    """What the losses report, of each example."""
    return {"loss": sums["loss"], "accuracy": sums["right"] / count, "margin": sums["margin"] / count}


def is_evaluation_due(run: RewardModelRun) -> bool:
    """Whether `evaluate.every` updates have passed since the last evaluation, or the run is at its end."""
    every, state = run.config.evaluate.every, run.state
    return state.update >= run.updates or (every > 0 and state.update // every > state.evaluated_at // every)


def evaluate(run: RewardModelRun) -> None:
    """Loss and accuracy on the held-out rows: pairs whose chosen one scores higher, responses on their label's side."""
    run.state.evaluated_at = run.state.update
    if not run.held_out:
        return
    with run.timer.phase("evaluate"):
        items = pack(run.held_out)
        scores = torch.tensor(run.policy.scores(items, plan(run, items)))
        if run.config.data.format is DataFormat.pairs:
            _, sums = pairwise_loss(scores, len(run.held_out))
        else:
            labels = torch.tensor([example.label for example in run.held_out])
            _, sums = pointwise_loss(scores, labels, len(run.held_out))
    found = means({name: float(value) for name, value in sums.items()}, len(run.held_out))
    run.log.evaluation(run.state, {f"eval/{name}": value for name, value in found.items()})
