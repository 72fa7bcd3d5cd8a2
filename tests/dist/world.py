"""One rank of a distributed test: `python world.py CASE --hf DIR --layout L --out FILE`. See the cases at the end."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

parser = argparse.ArgumentParser()
parser.add_argument("case")
parser.add_argument("--hf", type=Path)
parser.add_argument("--layout", default="1")
parser.add_argument("--out", type=Path)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--chunk-tokens", type=int, default=100)
parser.add_argument("--local-norm", action="store_true", help="divide by the micro-batch's own count: a known mistake")
parser.add_argument("--stay", action="store_true", help="move nothing to host memory")
parser.add_argument("--engines", nargs="*", help="of a publish, as EngineLayout.parse takes them")
parser.add_argument("--publish", default="fp32", help="the dtype of a publish")
parser.add_argument("--bucket-bytes", type=int, default=1 << 20)
args = parser.parse_args()
layout = Layout.parse(args.layout)
world = groups.initialize(layout, "cpu", seed=0, timeout_minutes=3)

import torch

from r1mega.algo.aggregation import token_weights
from r1mega.algo.policy_loss import policy_loss
from r1mega.models import hf_fields
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_io import CheckpointReader, CheckpointWriter, RandomWeights
from r1mega.train.batch import PackItem
from r1mega.train.optimizer import AdamSettings
from r1mega.train.policy import MegatronPolicy

fields = hf_fields.read(args.hf)
policy = MegatronPolicy(
    fields, world, ModelOptions(params_dtype=getattr(torch, args.dtype)), AdamSettings(lr=1e-3, weight_decay=0.0)
)


def save(value: object) -> None:
    if world.rank == 0:
        torch.save(value, args.out)


def round_trip() -> None:
    """Checkpoint -> shards of the layout -> checkpoint."""
    reader = CheckpointReader(args.hf)
    policy.load(reader)
    writer = (
        CheckpointWriter(args.out, source=args.hf, dtypes=reader.dtypes(), file_bytes=1 << 16)
        if world.rank == 0
        else None
    )
    for name, tensor in policy.export_hf(wanted=writer is not None):
        writer.add(name, tensor)
    if writer:
        writer.close()


def random_weights() -> None:
    """Weights made from names, exported."""
    policy.load(RandomWeights(fields, seed=7))
    save({name: tensor.clone() for name, tensor in policy.export_hf(wanted=world.rank == 0)})


def batch() -> tuple[list[PackItem], list[float], list[torch.Tensor], list[torch.Tensor]]:
    """Ten samples of unequal length, their advantages, and anchor and reference log-probs away from the policy's."""
    rng = random.Random(3)
    items = []
    for _ in range(10):
        length = rng.randint(8, 60)
        items.append(PackItem([rng.randrange(fields["vocab_size"]) for _ in range(length)], rng.randint(2, length - 2)))
    generator = torch.Generator().manual_seed(3)
    plan = policy.plan(items, 200)
    present = policy.logprobs(items, plan)
    anchor = [values + 0.3 * torch.randn(values.shape, generator=generator) for values in present]
    reference = [values + 0.3 * torch.randn(values.shape, generator=generator) for values in present]
    return items, [rng.uniform(-2, 2) for _ in items], anchor, reference


def grpo() -> None:
    """Loss, gradient and the parameters after three updates of the GRPO loss."""
    policy.load(CheckpointReader(args.hf))
    items, advantages, anchor, reference = batch()
    lengths = [item.num_response for item in items]
    weights = token_weights(lengths, "sequence_mean")

    def loss(logprobs_R, _entropy_R, micro):
        weight = weights
        if args.local_norm:
            weight = dict(zip(micro.samples, token_weights(list(micro.num_responses), "sequence_mean"), strict=True))
        value, sums = policy_loss(
            logprobs_R,
            torch.cat([anchor[i] for i in micro.samples]),
            torch.cat([reference[i] for i in micro.samples]),
            torch.tensor([advantages[i] for i in micro.samples])[micro.sequence_R],
            torch.tensor([weight[i] for i in micro.samples])[micro.sequence_R],
            clip_low=0.2,
            clip_high=0.2,
            kl_coef=0.1,
        )
        return value, {"loss": value.detach(), "clipped": sums["clipped_low"] + sums["clipped_high"]}

    plan = policy.plan(items, args.chunk_tokens)
    report = policy.forward_backward(items, plan, loss)
    gradients = {name: gradient.clone() for name, gradient in policy.gradients()}
    norms = [policy.optimizer_step(1e-3)]
    for _ in range(2):
        policy.forward_backward(items, plan, loss)
        norms.append(policy.optimizer_step(1e-3))
    weights_after = {name: tensor.clone() for name, tensor in policy.export_hf(wanted=world.rank == 0)}
    answer = {"report": report, "gradients": gradients, "norms": norms, "weights": weights_after}
    save(answer | {"micro_batches": plan.num_chunks})


def offload() -> None:
    """Weights after two updates, gradients and optimizer state having been in host memory in between."""
    policy.load(CheckpointReader(args.hf))
    items, _, _, _ = batch()
    plan = policy.plan(items, args.chunk_tokens)

    def loss(logprobs_R, _entropy_R, _micro):
        return -logprobs_R.sum() / 100, {}

    freed = []
    for _ in range(2):
        policy.forward_backward(items, plan, loss)
        policy.optimizer_step(1e-3)
        freed.append(0 if args.stay else policy.hand_over())
    numel = sum(parameter.numel() for chunk in policy.chunks for parameter in chunk.parameters())
    weights = {name: tensor.clone() for name, tensor in policy.export_hf(wanted=world.rank == 0)}
    save({"freed": freed, "numel": numel, "weights": weights})


def mtp_alone() -> None:
    """Gradients without the loss two tokens ahead, with it on its layer alone, and with it on the whole model."""
    policy.load(CheckpointReader(args.hf))
    items, _, _, _ = batch()
    plan = policy.plan(items, args.chunk_tokens)

    def loss(logprobs_R, _entropy_R, _micro):
        return -logprobs_R.sum() / 100, {}

    found = {}
    for name, weight, trains_trunk in (("none", 0.0, True), ("alone", 0.01, False), ("joint", 0.01, True)):
        policy.trains_trunk_further = trains_trunk
        policy.forward_backward(items, plan, loss, mtp_weight=weight)
        found[name] = {name: gradient.clone() for name, gradient in policy.gradients()}
    save(found)


def exchange() -> None:
    """A publish among these ranks: what each engine rank is handed, as rank 0 hears of it."""
    from r1mega.parallel.collectives import gather
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.exchange import Exchange
    from r1mega.weights.plan import PublishPlan

    policy.load(CheckpointReader(args.hf))
    engines = [EngineLayout.parse(text) for text in args.engines]
    plan = PublishPlan(fields, layout, engines, dtype=args.publish, bucket_bytes=args.bucket_bytes, split_bytes=100)
    mine = [
        (parcel.receiver, bucket, name, tensor.clone())
        for bucket, parcels in enumerate(
            Exchange(plan, world.rank, layout.world_size, world.device).buckets(policy.shards())
        )
        for parcel in parcels
        for name, tensor in parcel.tensors.items()
    ]
    save([entry for part in gather(mine, world.control) for entry in part])


CASES = (mtp_alone, offload, round_trip, random_weights, grpo, exchange)
{case.__name__: case for case in CASES}[args.case]()
groups.shutdown()
