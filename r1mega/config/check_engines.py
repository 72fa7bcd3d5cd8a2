"""Rules of the engines: how many, where they live, what their servers are asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from r1mega.config.choices import DeviceType, EngineKind, Loop, Transport
from r1mega.config.faults import Fault
from r1mega.config.schema import Config


def check_engines(config: Config) -> Iterator[Fault]:
    """Faults of `rollout.engine`, `rollout.engines` and, where it is asked for, of `sglang`."""
    if config.rollout.engine is EngineKind.embedded:
        world = config.parallel.world_size
        if config.rollout.engines > world >= 1:
            remedy = f"use at most {world}, or a larger layout"
            constraint = f"must be at most the {world} training processes that can host an engine"
            yield Fault("rollout.engines", str(config.rollout.engines), constraint, remedy)
    elif config.stage.loop is Loop.rl:
        yield from _check_servers(config)


def _check_servers(config: Config) -> Iterator[Fault]:
    sglang = config.sglang
    if shutil.which(sglang.python) is None:
        constraint = "must be the Python of an environment with SGLang"
        remedy = "make it (without a GPU: make sglang-cpu) or set sglang.python; or use rollout=embedded"
        yield Fault("sglang.python", os.path.abspath(sglang.python), constraint, remedy)
    for axis in ("ep", "attn_dp"):
        size = getattr(sglang, axis)
        if size >= 1 and sglang.tp % size:
            yield Fault(f"sglang.{axis}", str(size), f"must divide sglang.tp={sglang.tp}", "change one of them")
    num_ranks, world = config.rollout.engines * sglang.tp, config.parallel.world_size
    if sglang.transport is Transport.ipc and config.device.type is DeviceType.cuda and num_ranks != world:
        constraint = f"servers of {num_ranks} processes in all cannot be paired with {world} training ones"
        yield Fault("sglang.transport", "ipc", constraint, "change rollout.engines or sglang.tp, or use disk")
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    cached = sglang.cached_tokens(config.device.type)
    if cached is not None and 1 <= cached < longest:
        constraint = f"must hold the longest prompt and response, {longest} tokens"
        yield Fault("sglang.max_cached_tokens", str(cached), constraint, "raise it")
