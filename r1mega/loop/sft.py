"""Supervised fine-tuning: packed, each sample isolated, loss on the responses only."""

from __future__ import annotations

import torch

from r1mega.config.schema import Config
from r1mega.data.sft import SftExample
from r1mega.loop import supervised
from r1mega.loop.records import expert_metrics
from r1mega.loop.wire_supervised import SftRun, wire_sft
from r1mega.train.batch import MicroBatch, PackItem


def main(config: Config) -> None:
    """Run one rank of the fine-tuning that `config` describes, to the exported checkpoint."""
    with wire_sft(config) as run:
        train(run)


def train(run: SftRun) -> None:
    """Take `sft.updates` steps of `sft.batch_size` examples."""
    config, state = run.config, run.state
    while state.update < config.sft.updates:
        with run.timer.phase("train"):
            items = [pack_item(example) for example in run.examples.next(config.sft.batch_size)]
            metrics = step(run, items)
        supervised.close_update(run, metrics, sum(len(item.tokens) for item in items))
        supervised.keep(run)
    supervised.finish(run)


def pack_item(example: SftExample) -> PackItem:
    """An example as the model takes it; its loss mask is 1 on the response, which is the end of it."""
    return PackItem(example.token_ids, sum(example.loss_mask))


def step(run: SftRun, items: list[PackItem]) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy of all response tokens of the batch."""
    sft = run.config.sft
    num_tokens = sum(item.num_response for item in items)

    def loss(logprobs_R: torch.Tensor, _entropy_R: torch.Tensor, _micro: MicroBatch):
        value = -logprobs_R.sum() / num_tokens
        return value, {"loss": value.detach()}

    lr = run.learning_rate(sft.updates)
    plan = run.policy.plan(items, sft.max_tokens_per_micro_batch)
    sums = run.policy.forward_backward(items, plan, loss, mtp_weight=run.mtp_weight(num_tokens))
    grad_norm = run.policy.optimizer_step(lr)
    metrics = {"train/loss": sums["loss"], "train/grad_norm": grad_norm, "train/lr": lr} | expert_metrics(sums)
    if "mtp_loss" in sums:
        metrics["train/mtp_loss"] = sums["mtp_loss"]
    return metrics
