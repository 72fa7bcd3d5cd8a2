"""Supervised fine-tuning: packed, each sample isolated, loss on the answers only."""

from __future__ import annotations

from itertools import groupby

import torch

from r1mega.algo.packing import Plan
from r1mega.algo.window_packing import plan_chunks
from r1mega.config.schema import Config
from r1mega.data.sft import SftExample
from r1mega.data.sft_source import RowBatch
from r1mega.loop import supervised
from r1mega.loop.records import expert_metrics
from r1mega.loop.wire_supervised import SftRun, wire_sft
from r1mega.train.batch import ELSEWHERE, MicroBatch, PackItem


def main(config: Config) -> None:
    """Run one rank of the fine-tuning that `config` describes, to the exported checkpoint."""
    with wire_sft(config) as run:
        train(run)


def train(run: SftRun) -> None:
    """Take `sft.updates` steps, each of `sft.batch_size` examples or of `sft.chunks_per_update` chunks."""
    config, state = run.config, run.state
    while state.update < config.sft.updates:
        with run.timer.phase("train"):
            batch = run.examples.next()
            lengths = [int(run.rows.tokens[row]) for row in batch.rows]
            metrics = step(run, batch, lengths)
        supervised.close_update(run, metrics, sum(lengths))
        supervised.keep(run)
    supervised.finish(run)


def pack_item(example: SftExample) -> PackItem:
    """An example as the model takes it, with the runs of its loss mask."""
    spans, at = [], 0
    for is_learned, run in groupby(example.loss_mask):
        size = sum(1 for _ in run)
        if is_learned:
            spans.append((at, at + size))
        at += size
    return PackItem(example.token_ids, sum(example.loss_mask), spans=tuple(spans))


def plan_of(run: SftRun, batch: RowBatch, lengths: list[int]) -> Plan:
    """Which examples each rank computes together: those of a window are packed already."""
    limit = run.config.sft.max_tokens_per_micro_batch
    if batch.chunks is None:
        return run.policy.plan_lengths(lengths, limit)
    return plan_chunks(lengths, batch.chunks, dp=run.layout.dp, max_tokens=limit)


def items_of(run: SftRun, batch: RowBatch, plan: Plan) -> list[PackItem]:
    """The batch's sequences; those alone are read and tokenized that this rank computes."""
    mine = sorted(place for chunk in plan.chunks[run.groups.coordinate.dp] for place in chunk)
    items = [ELSEWHERE] * len(batch.rows)
    for place, example in zip(mine, run.rows.examples([batch.rows[place] for place in mine]), strict=True):
        items[place] = pack_item(example)
    return items


def step(run: SftRun, batch: RowBatch, lengths: list[int]) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy of all learned tokens of the batch, over all ranks."""
    sft = run.config.sft
    num_tokens = sum(int(run.rows.learned[row]) for row in batch.rows)

    def loss(logprobs_R: torch.Tensor, _entropy_R: torch.Tensor, _micro: MicroBatch):
        value = -logprobs_R.sum() / num_tokens
        return value, {"loss": value.detach()}

    lr = run.learning_rate(sft.updates)
    plan = plan_of(run, batch, lengths)
    sums = run.policy.forward_backward(items_of(run, batch, plan), plan, loss, mtp_weight=run.mtp_weight(num_tokens))
    grad_norm = run.policy.optimizer_step(lr)
    metrics = {"train/loss": sums["loss"], "train/grad_norm": grad_norm, "train/lr": lr} | expert_metrics(sums)
    if batch.chunks is not None:
        metrics |= {"train/sequences": float(len(batch.rows)), "train/fill": plan.fill()}
    if "mtp_loss" in sums:
        metrics["train/mtp_loss"] = sums["mtp_loss"]
    return metrics
