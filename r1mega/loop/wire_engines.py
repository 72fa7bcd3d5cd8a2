"""A configuration -> the engines of a run and the way weights reach them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from r1mega.config.choices import EngineKind, Transport
from r1mega.config.schema import Config
from r1mega.types import Engine, TrainerWeights
from r1mega.weights.shelf import Shelf, folder_of

if TYPE_CHECKING:
    import torch

    from r1mega.loop.wire import RlRun
    from r1mega.rollout.sglang import SglangEngines

Publish = Callable[[TrainerWeights, int], None]


def engines_of(config: Config, run: RlRun) -> tuple[Engine | None, int, Publish]:
    """What this rank generates with, if it does; how many ranks do; and how weights go there, collectively."""
    if config.rollout.engine is EngineKind.embedded:
        return _embedded(config, run)
    place = Shelf(folder_of(config.run.dir, config.sglang.weights_dir))
    servers = _servers(config, place) if run.groups.rank == 0 else None
    return servers, 1, _publisher(config, run, place, servers)


def _embedded(config: Config, run: RlRun) -> tuple[Engine | None, int, Publish]:
    from r1mega.rollout.embedded import EmbeddedEngine
    from r1mega.weights import memory

    rollout, engine = config.rollout, None
    if run.groups.rank < rollout.engines:
        dtype, device = torch_dtype(config.precision.params), run.groups.device
        engine = EmbeddedEngine(config.model.hf, run.tokenizer, dtype, device, rollout.max_batch)
    return engine, rollout.engines, lambda weights, version: memory.publish(weights, engine, version)


def _servers(config: Config, place: Shelf) -> SglangEngines:
    from r1mega.rollout.sglang import SglangEngines

    # The other ranks wait meanwhile, and no longer than this.
    patience = 0.8 * 60 * config.run.timeout_minutes
    urls = json.loads(place.addresses.read_text(encoding="utf-8"))
    return SglangEngines(urls, max_in_flight=config.rollout.max_in_flight, patience_seconds=patience)


def _publisher(config: Config, run: RlRun, place: Shelf, servers: SglangEngines | None) -> Publish:
    from r1mega.weights.disk import DiskPublisher
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.exchange import Exchange
    from r1mega.weights.ipc import IpcPublisher
    from r1mega.weights.plan import PublishPlan
    from r1mega.weights.proof import PublishProof, build_of

    sglang, groups = config.sglang, run.groups
    dtype = str(sglang.dtype or config.precision.params)
    layout = EngineLayout(tp=sglang.tp, ep=sglang.ep, attn_dp=sglang.attn_dp)
    build = build_of(str(config.device.type), sglang.extra_args)
    proof = PublishProof(run.fields, layout, build, torch_dtype(dtype), sglang.verify_share)
    if sglang.transport is Transport.disk:
        return DiskPublisher(place, servers, run.fields, dtype, proof, groups.control).publish
    engines = [layout] * config.rollout.engines
    plan = PublishPlan(run.fields, run.layout, engines, dtype=dtype, bucket_bytes=sglang.bucket_bytes, with_mtp=False)
    exchange = Exchange(plan, groups.rank, run.layout.world_size, groups.device, in_shared_memory=True)
    return IpcPublisher(exchange, servers, proof, groups.control).publish


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a configuration calls by this name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[str(name)]
