"""A configuration -> the way weights reach the engines of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from r1mega.config.choices import DeviceType, Transport
from r1mega.config.schema import Config
from r1mega.rollout.server import ServerOptions
from r1mega.types import TrainerWeights
from r1mega.weights.shelf import Shelf, folder_of

if TYPE_CHECKING:
    import torch

    from r1mega.loop.wire import RlRun
    from r1mega.rollout.sglang import SglangEngines
    from r1mega.weights.proof import PublishProof
    from r1mega.weights.spread import SpreadWriter

Publish = Callable[[TrainerWeights, int], None]


def publisher_of(config: Config, run: RlRun, place: Shelf, servers: SglangEngines | None) -> Publish:
    """Brings weights to every server, under a version. Collective."""
    from r1mega.weights.disk import DiskPublisher
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.exchange import Exchange
    from r1mega.weights.ipc import IpcPublisher
    from r1mega.weights.plan import PublishPlan
    from r1mega.weights.proof import PublishProof, build_of

    sglang, groups = config.sglang, run.groups
    dtype, held = served_dtype(config), str(config.precision.params)
    layout = EngineLayout(tp=sglang.tp, ep=sglang.ep, attn_dp=sglang.attn_dp)
    build = build_of(str(config.device.type), [*server_options(config).arguments(), *sglang.extra_args])
    proof = PublishProof(run.fields, layout, build, torch_dtype(dtype), sglang.verify_share)
    if sglang.transport is Transport.disk:
        return DiskPublisher(place, servers, _writer(config, run, place, proof), proof, groups.control).publish
    if sglang.transport in (Transport.gloo, Transport.nccl):
        publish = _group_publisher(config, run, servers, proof)
        return _with_copy(config, run, place, publish) if sglang.recovery_copy else publish
    engines = [layout] * config.rollout.engines
    moves = held if dtype == "fp8" else dtype  # blocks are made where a tensor is whole
    plan = PublishPlan(run.fields, run.layout, engines, dtype=moves, bucket_bytes=sglang.bucket_bytes, with_mtp=False)
    exchange = Exchange(
        plan, groups.rank, run.layout.world_size, groups.device, in_shared_memory=True, serves_fp8=dtype == "fp8"
    )
    publish = IpcPublisher(exchange, servers, proof, groups.control).publish
    return _with_copy(config, run, place, publish) if sglang.recovery_copy else publish


def _group_publisher(config: Config, run: RlRun, servers: SglangEngines | None, proof: PublishProof) -> Publish:
    from r1mega.weights.gathering import Gathering
    from r1mega.weights.process_group import GroupPublisher, plan_for

    sglang, groups = config.sglang, run.groups
    plan = plan_for(
        run.fields,
        run.layout,
        proof,
        serves=served_dtype(config),
        held=str(config.precision.params),
        backend=str(sglang.transport),
        turn_bytes=sglang.bucket_bytes,
    )
    return GroupPublisher(
        Gathering(plan, groups.rank, groups.device),
        servers,
        proof,
        groups.control,
        num_ranks=[sglang.tp] * config.rollout.engines,
        backend=str(sglang.transport),
        seconds=patience_of(config),
    ).publish


def _with_copy(config: Config, run: RlRun, place: Shelf, publish: Publish) -> Publish:
    """Publish, and begin to write what was published to the disk."""
    from r1mega.weights.recovery import RecoveryCopy

    copy = RecoveryCopy(place, _writer(config, run, place, None, snapshot=True), run.groups.control)

    def publish_and_keep(weights: TrainerWeights, version: int) -> None:
        publish(weights, version)
        copy.keep(weights, version)

    return publish_and_keep


def _writer(
    config: Config, run: RlRun, place: Shelf, proof: PublishProof | None, *, snapshot: bool = False
) -> SpreadWriter:
    from r1mega.weights.spread import SpreadWriter
    from r1mega.weights.write_plan import WritePlan

    plan = WritePlan(
        run.fields,
        run.layout,
        serves=served_dtype(config),
        held=str(config.precision.params),
        together=proof.together() if proof else (),
        turn_bytes=max(config.sglang.bucket_bytes // 4, 1),  # two turns at once, each gathered and on the host
    )
    return SpreadWriter(plan, run.groups.rank, run.groups.device, place.model, run.groups.control, snapshot=snapshot)


def shelf_of(config: Config) -> Shelf:
    """The folder that weights are published in, and where trainer and servers find each other."""
    return Shelf(folder_of(config.run.dir, config.sglang.weights_dir))


def patience_of(config: Config) -> float:
    """Seconds that servers may be silent: the other ranks wait meanwhile, and no longer than this."""
    return 0.8 * 60 * config.run.timeout_minutes


def served_dtype(config: Config) -> str:
    """The dtype that the servers hold weights in."""
    return str(config.sglang.dtype or config.precision.params)


def server_options(config: Config) -> ServerOptions:
    """What the servers are asked for besides. Nothing can be given back on a CPU: there the calls alone are made."""
    sglang = config.sglang
    return ServerOptions(
        memory_saver=sglang.release and config.device.type is DeviceType.cuda,
        deterministic=sglang.deterministic,
        kv_cache_dtype=str(sglang.kv_cache_dtype),
        moe_a2a_backend=str(sglang.moe_a2a_backend),
        redundant_experts=sglang.redundant_experts,
        speculative_steps=sglang.speculative_steps,
        routed_experts=config.rollout.router_replay,
    )


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a configuration calls by this name; of "fp8" that which engines compute in."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[str(name)]
