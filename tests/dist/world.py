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
parser.add_argument("--choices", type=Path, help="experts to replay, as the case `own_choices` saves them")
parser.add_argument("--engines", nargs="*", help="of a publish, as EngineLayout.parse takes them")
parser.add_argument("--publish", default="fp32", help="the dtype of a publish")
parser.add_argument("--bucket-bytes", type=int, default=1 << 20)
parser.add_argument("--one-owner", action="store_true", help="in each stage, as over NCCL")
parser.add_argument("--kill", action="store_true", help="an engine, in mid-publish")
parser.add_argument("--diverge", action="store_true", help="a weight that FP8 cannot hold")
parser.add_argument("--flip", action="store_true", help="one bit of a weight, in mid-publish")
args = parser.parse_args()
layout = Layout.parse(args.layout)
world = groups.initialize(layout, "cpu", seed=0, timeout_minutes=3)

import torch

from r1mega.algo.aggregation import token_weights
from r1mega.algo.policy_loss import policy_loss
from r1mega.algo.window_packing import pack_window, plan_chunks
from r1mega.models import hf_fields
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_io import CheckpointReader, CheckpointWriter, RandomWeights
from r1mega.models.router import SequenceRouter
from r1mega.train import batch as batch_module
from r1mega.train import routes
from r1mega.train.batch import PackItem
from r1mega.train.optimizer import AdamSettings
from r1mega.train.policy import MegatronPolicy

HELD = {"float32": "fp32", "bfloat16": "bf16"}
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


def isolation() -> None:
    """Loss and gradients of conversations packed best fit, of each alone, and of packs whose parts see each other."""
    policy.load(CheckpointReader(args.hf))
    rng, items = random.Random(5), []
    for _ in range(24):
        size = rng.randint(6, 40)
        begin = rng.randint(1, size - 4)
        spans = ((begin, begin + 1), (rng.randint(begin + 2, size - 1), size))  # two answers, with a hole between
        tokens = [rng.randrange(fields["vocab_size"]) for _ in range(size)]
        items.append(PackItem(tokens, sum(end - start for start, end in spans), spans=spans))
    lengths = [len(item.tokens) for item in items]
    ready, waiting = pack_window(lengths, max_tokens=args.chunk_tokens, multiple=layout.dp)
    packed = plan_chunks(lengths, [*ready, *waiting], dp=1, max_tokens=args.chunk_tokens)
    alone = plan_chunks(lengths, [[place] for place in range(len(items))], dp=1, max_tokens=args.chunk_tokens)
    num_tokens = sum(item.num_response for item in items)

    def loss(logprobs_R, _entropy_R, _micro):
        value = -logprobs_R.sum() / num_tokens
        return value, {"loss": value.detach()}

    def found(plan):
        report = policy.forward_backward(items, plan, loss)
        return report["loss"], {name: gradient.clone() for name, gradient in policy.gradients()}

    answer = {"items": items, "chunks": packed.chunks[0], "packed": found(packed), "alone": found(alone)}
    one_by_one = batch_module.PackedSequences.of
    batch_module.PackedSequences.of = lambda lengths, *rest, **options: one_by_one([sum(lengths)], *rest, **options)
    save(answer | {"mixed": found(packed)})


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
        freed.append(0 if args.stay else policy.hand_over(keeps_weights=True) + policy.hand_over())
        # The weights alone come back for a forward pass, and go again; the rest comes back with the next update.
        policy.logprobs(items, plan)
        assert args.stay or policy.hand_over() < freed[-1] / 3
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
    is_fp8 = args.publish == "fp8"
    moves = HELD[args.dtype] if is_fp8 else args.publish
    plan = PublishPlan(fields, layout, engines, dtype=moves, bucket_bytes=args.bucket_bytes, split_bytes=100)
    moving = Exchange(plan, world.rank, layout.world_size, world.device, serves_fp8=is_fp8)
    mine = [
        # torch pickles no FP8 storage.
        (parcel.receiver, bucket, name, tensor.clone().view(torch.uint8 if tensor.itemsize == 1 else tensor.dtype))
        for bucket, parcels in enumerate(moving.buckets(policy.shards()))
        for parcel in parcels
        for name, tensor in parcel.tensors.items()
    ]
    save([entry for part in gather(mine, world.control) for entry in part])


class _Recorder:
    """Stands where a router asks for a choice that is given, and only notes its own."""

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []

    def get_replay_topk(self, scores, topk, num_groups, group_topk, choose):
        values, experts = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self.chosen.append(experts)
        return values, experts


def own_choices() -> None:
    """The experts that the routers choose for each token but the last of a sequence, all layers on one process."""
    policy.load(CheckpointReader(args.hf))
    items, *_ = batch()
    routers = [module for module in policy.chunks[0].modules() if isinstance(module, SequenceRouter)]
    for router in routers:
        router.router_replay = _Recorder()
    for item in items:
        policy.logprobs([item], policy.plan([item], 100))
    layers = [[experts[:-1] for experts in router.router_replay.chosen] for router in routers]
    save([torch.stack(one, 1).to(torch.uint8) for one in zip(*layers, strict=True)])


def replay() -> None:
    """Log-probs, gradients and reported sums, with the experts of --choices where these are given."""
    policy.load(CheckpointReader(args.hf))
    items, *_ = batch()
    if args.choices:
        items = routes.deal(items, torch.load(args.choices), fields, world)
    plan = policy.plan(items, args.chunk_tokens)
    logprobs = policy.logprobs(items, plan)
    report = policy.forward_backward(items, plan, lambda logprobs_R, _entropy_R, _micro: (-logprobs_R.sum() / 100, {}))
    gradients = {name: gradient.clone() for name, gradient in policy.gradients()}
    tokens = sum(len(item.tokens) - 1 for item in items)
    save({"logprobs": torch.cat(logprobs), "gradients": gradients, "report": report, "tokens": tokens})


def broadcast() -> None:
    """Three publishes over groups with engine processes: what each rank received, and how often groups were made.

    Before the second one an engine is started again; with --kill, one dies in the middle of the first; with --flip, one
    bit of it is another one. With --diverge, what every rank hears of one publish.
    """
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from engine_ranks import EngineProcesses

    from r1mega.parallel.collectives import gather
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.gathering import Gathering
    from r1mega.weights.process_group import GroupPublisher, plan_for
    from r1mega.weights.proof import PublishProof, build_of

    policy.load(CheckpointReader(args.hf))
    engines = [EngineLayout.parse(text) for text in args.engines]
    dtype = torch.float32 if args.publish == "fp32" else torch.bfloat16
    proof = PublishProof(fields, engines[0], build_of("cpu", ()), dtype, 1.0)
    servers = EngineProcesses(fields, engines, dtype, args.out.parent) if world.rank == 0 else None
    plan = plan_for(
        fields, layout, proof, serves=args.publish, held=HELD[args.dtype], backend="nccl" if args.one_owner else "gloo",
        turn_bytes=args.bucket_bytes,
    )  # fmt: skip
    publisher = GroupPublisher(
        Gathering(plan, world.rank, world.device),
        servers,
        proof,
        world.control,
        num_ranks=[engine.num_ranks for engine in engines],
        backend="gloo",
        seconds=60,
    )
    if servers is not None and args.kill:
        servers.die_at(len(engines) - 1, update=3)
    if servers is not None and args.flip:
        servers.flip_at(0, update=3)
    if args.diverge:
        heard = gather(diverged(publisher), world.control)
        if servers is not None:
            save({"heard": heard})
            servers.end()
        return
    publisher.publish(policy, 1)
    if servers is not None and not (args.kill or args.flip):
        servers.restart(0)
    publisher.publish(policy, 2)
    publisher.publish(policy, 3)
    if servers is not None:
        save({"joins": servers.joins, "updates": servers.updates, "received": servers.received()})
        servers.end()


def diverged(publisher) -> str:
    """What a rank hears of a publish of weights that are no numbers."""
    from r1mega.weights.proof import PublishError

    for slot, _, parameter in policy.shards():
        if slot.tensors[0].name == "model.layers.3.mlp.down_proj.weight":
            parameter.detach().fill_(float("nan"))
    try:
        publisher.publish(policy, 1)
    except PublishError as error:
        return str(error)
    return ""


def spread_plan(together=()):
    from r1mega.weights.write_plan import WritePlan

    return WritePlan(
        fields, layout, serves=args.publish, held=HELD[args.dtype], together=together,
        turn_bytes=args.bucket_bytes, file_bytes=1 << 18,
    )  # fmt: skip


def spread() -> None:
    """A checkpoint that all ranks write, its digests, and what all hear when the last rank's disk is full."""
    import errno
    import os

    from r1mega.parallel.collectives import gather
    from r1mega.weights import spread
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.proof import PublishProof, build_of

    policy.load(CheckpointReader(args.hf))
    (engine,) = [EngineLayout.parse(text) for text in args.engines]
    served = torch.float32 if args.publish == "fp32" else torch.bfloat16
    proof = PublishProof(fields, engine, build_of("cpu", ()), served, 1.0)
    writer = spread.SpreadWriter(spread_plan(proof.together()), world.rank, world.device, args.hf, world.control)
    for _ in range(2):  # what is kept from one to the next is used again
        expected = proof.expect(0, tensors=writer.plan.tensors_of(world.rank))
        writer.write(policy.shards(), args.out, expected)
    digests = proof.merged(gather(expected.results(), world.control), 0)
    real = spread.write_bytes

    def full(path: Path, *rest: object) -> None:
        if world.rank == layout.world_size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *rest)

    spread.write_bytes = full
    heard = ""
    try:
        writer.write(policy.shards(), args.out.with_name("other"))
    except spread.WriteError as error:
        heard = str(error)
    spread.write_bytes = real
    heard_by = gather(heard, world.control)
    writer.write(policy.shards(), args.out)  # and again, once there is room
    if world.rank == 0:
        torch.save({"digests": digests, "heard": heard_by, "turns": len(writer.plan.turns)}, args.out / "found")


def recovery() -> None:
    """Two copies in a row, the parameters changing as soon as each was taken."""
    from r1mega.weights.recovery import RecoveryCopy
    from r1mega.weights.shelf import Shelf
    from r1mega.weights.spread import SpreadWriter

    place = Shelf(args.out)
    writer = SpreadWriter(spread_plan(), world.rank, world.device, args.hf, world.control, snapshot=True)
    copy = RecoveryCopy(place, writer, world.control)
    for version in (3, 4, 5):
        policy.load(CheckpointReader(args.hf))
        copy.keep(policy, version)
        for _, _, parameter in policy.shards():
            parameter.detach().fill_(float("nan"))
    copy.settle()
    assert world.rank > 0 or place.newest().version == 5


RL = (mtp_alone, offload, grpo, isolation, own_choices, replay)
WEIGHTS = (round_trip, random_weights, exchange, broadcast, spread, recovery)
{case.__name__: case for case in (*RL, *WEIGHTS)}[args.case]()
groups.shutdown()
