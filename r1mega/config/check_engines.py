"""Rules of the engines: how many, where they live, what their servers are asked for."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.choices import (
    GENERATING_LOOPS,
    SAMPLING_LOOPS,
    DeviceType,
    EngineDtype,
    EngineKind,
    KvCacheDtype,
    Loop,
    MoeA2aBackend,
    Mtp,
    Transport,
)
from r1mega.config.faults import Fault
from r1mega.config.schedule import most_tokens
from r1mega.config.schema import Config

# A server of a large model reads its files, compiles and records CUDA graphs before it first answers.
_STARTUP_SECONDS = 300.0


def check_engines(config: Config, *, here: bool = True) -> Iterator[Fault]:
    """Faults of `rollout.engine`, `rollout.engines` and, where it is asked for, of `sglang`; see check.check."""
    if config.stage.loop is Loop.rl:
        yield from _check_streaming(config)
    if config.rollout.engine is EngineKind.embedded:
        world = config.parallel.world_size
        if config.stage.loop not in SAMPLING_LOOPS and config.rollout.engines > world >= 1:
            remedy = f"use at most {world}, or a larger layout"
            constraint = f"must be at most the {world} training processes that can host an engine"
            yield Fault("rollout.engines", str(config.rollout.engines), constraint, remedy)
        if config.rollout.router_replay and config.stage.loop is Loop.rl:
            constraint = "the embedded engine does not tell which experts it chose"
            yield Fault("rollout.router_replay", "true", constraint, "use rollout=sglang, or set it to false")
    elif config.stage.loop in GENERATING_LOOPS:
        yield from _check_servers(config, here)


def _check_streaming(config: Config) -> Iterator[Fault]:
    """Rules of what is asked of the engines beyond a round's groups."""
    rollout = config.rollout
    for field, is_on in (
        ("over_sampling", rollout.over_sampling > 1),
        ("carry_partial", rollout.carry_partial),
        ("max_staleness", rollout.max_staleness > 0),
    ):
        if is_on and rollout.engine is EngineKind.embedded:
            constraint = "the embedded engine generates a round as a whole, in the trainer's own process"
            value = str(getattr(rollout, field)).lower()
            yield Fault(f"rollout.{field}", value, constraint, "use rollout=sglang, or take it back to its default")
    if rollout.max_staleness > 0 and config.memory.offload:
        constraint = "memory.offload gives the engines the trainer's memory, in turns; they run beside it here"
        yield Fault("rollout.max_staleness", str(rollout.max_staleness), constraint, "set one of them to its default")
    if rollout.carry_partial and rollout.over_sampling <= 1 and rollout.max_staleness == 0:
        constraint = "with rollout.over_sampling=1 and rollout.max_staleness=0 nothing is left over"
        yield Fault("rollout.carry_partial", "true", constraint, "raise rollout.over_sampling, or set it to false")


def _check_servers(config: Config, here: bool) -> Iterator[Fault]:
    sglang = config.sglang
    if here and shutil.which(sglang.python) is None:
        constraint = "must be the Python of an environment with SGLang"
        remedy = "make it (without a GPU: make sglang-cpu) or set sglang.python; or use rollout=embedded"
        yield Fault("sglang.python", os.path.abspath(sglang.python), constraint, remedy)
    for axis in ("ep", "attn_dp", "nodes_per_engine"):
        size = getattr(sglang, axis)
        if size >= 1 and sglang.tp % size:
            yield Fault(f"sglang.{axis}", str(size), f"must divide sglang.tp={sglang.tp}", "change one of them")
    num_ranks, world = config.rollout.engines * sglang.tp, config.parallel.world_size
    if sglang.transport is Transport.ipc and config.device.type is DeviceType.cuda and num_ranks != world:
        constraint = f"servers of {num_ranks} processes in all cannot be paired with {world} training ones"
        yield Fault("sglang.transport", "ipc", constraint, "change rollout.engines or sglang.tp, or use disk")
    if sglang.dtype is EngineDtype.fp8 and config.device.type is not DeviceType.cuda:
        constraint = f"SGLang serves FP8 on CUDA alone, and device.type is {config.device.type}"
        yield Fault("sglang.dtype", "fp8", constraint, "use bf16 or fp32")
    if sglang.recovery_copy and sglang.transport is Transport.disk:
        constraint = "sglang.transport=disk writes each version already"
        yield Fault("sglang.recovery_copy", "true", constraint, "set it to false")
    yield from _check_places(config, here)
    yield from _check_groups(config)
    longest = config.data.max_prompt_tokens + most_tokens(config)[1]
    if config.stage.loop is Loop.evaluate:
        longest = config.benchmark.max_prompt_tokens + config.benchmark.max_tokens
    cached = sglang.cached_tokens(config.device.type)
    if cached is not None and 1 <= cached < longest:
        constraint = f"must hold the longest prompt and response, {longest} tokens"
        yield Fault("sglang.max_cached_tokens", str(cached), constraint, "raise it")
    yield from _check_options(config)
    yield from _check_turns(config)


def _check_options(config: Config) -> Iterator[Fault]:
    """What SGLang offers besides, and cannot give here, or not together."""
    sglang = config.sglang
    gpu_only = {
        "deterministic": sglang.deterministic,
        "kv_cache_dtype": sglang.kv_cache_dtype is not KvCacheDtype.auto,
        "moe_a2a_backend": sglang.moe_a2a_backend is not MoeA2aBackend.none,
        "speculative_steps": sglang.speculative_steps > 0,
    }
    for name, is_on in gpu_only.items():
        if is_on and config.device.type is DeviceType.cpu:
            value = str(getattr(sglang, name)).lower()
            remedy = f"take sglang.{name} back to its default"
            yield Fault(f"sglang.{name}", value, "needs a GPU (device=cuda)", remedy)
    if sglang.moe_a2a_backend is not MoeA2aBackend.none and sglang.ep != sglang.tp:
        constraint = f"spreads the experts over all ranks of a server, and sglang.ep={sglang.ep} of {sglang.tp}"
        yield Fault("sglang.moe_a2a_backend", str(sglang.moe_a2a_backend), constraint, f"set sglang.ep={sglang.tp}")
    if sglang.redundant_experts:
        yield from _check_redundant_experts(config)
    if sglang.speculative_steps and config.model.mtp is Mtp.drop:
        constraint = "drafts with the multi-token-prediction layer, which model.mtp=drop leaves out"
        yield Fault("sglang.speculative_steps", str(sglang.speculative_steps), constraint, "use model.mtp=freeze")
    if sglang.speculative_steps and sglang.transport is not Transport.disk:
        constraint = f"the layer's checkpoint tensors do not travel with sglang.transport={sglang.transport}"
        yield Fault("sglang.speculative_steps", str(sglang.speculative_steps), constraint, "use disk")
    if sglang.release and sglang.transport not in (Transport.ipc, Transport.disk):
        constraint = f"takes turns on one machine, and sglang.transport={sglang.transport} is for two"
        yield Fault("sglang.release", "true", constraint, "use sglang.transport=ipc, or sglang.release=false")


def _check_redundant_experts(config: Config) -> Iterator[Fault]:
    sglang, got = config.sglang, str(config.sglang.redundant_experts)
    if sglang.ep == 1:
        constraint = "copies are spread over expert parallel ranks, of which sglang.ep=1 has one"
        yield Fault("sglang.redundant_experts", got, constraint, "raise sglang.ep, or use 0")
    if sglang.transport is not Transport.disk:
        constraint = f"only SGLang knows which rank holds which copy; sglang.transport={sglang.transport} must too"
        yield Fault("sglang.redundant_experts", got, constraint, "use sglang.transport=disk")
    if sglang.verify_share:
        constraint = "the checksums of parameters with copies cannot be worked out"
        remedy = "set sglang.verify_share=0 and keep rollout.probe_sequences"
        yield Fault("sglang.redundant_experts", got, constraint, remedy)


def _check_places(config: Config, here: bool) -> Iterator[Fault]:
    """Where servers are, and what stands before them."""
    sglang, engines = config.sglang, config.rollout.engines
    if sglang.transport is Transport.ipc and (sglang.hosts or sglang.nodes_per_engine > 1):
        constraint = "handles of memory go to processes of the same machine"
        yield Fault("sglang.transport", "ipc", constraint, "use disk, or neither sglang.hosts nor nodes_per_engine")
    if sglang.hosts:
        yield from _check_hosts(config, here)
    elif sglang.remote is not None:
        constraint = "starts servers on sglang.hosts, which is empty"
        yield Fault("sglang.remote", sglang.remote, constraint, "name the hosts or leave it out")
    if sglang.router and engines == 1:
        yield Fault("sglang.router", "true", "a router has nothing to choose from", "raise rollout.engines or leave it")
    if sglang.router and sglang.transport is not Transport.disk:
        constraint = "a router cannot be kept from asking a restarted server, which finds its weights on a disk alone"
        yield Fault("sglang.router", "true", constraint, "use sglang.transport=disk")
    if config.device.type is DeviceType.cuda and 0 < sglang.startup_seconds < _STARTUP_SECONDS:
        constraint = f"must be at least {_STARTUP_SECONDS:g}: a server that still compiles would be killed"
        yield Fault("sglang.startup_seconds", f"{sglang.startup_seconds:g}", constraint, "raise it")


def _check_turns(config: Config) -> Iterator[Fault]:
    """What cannot be with rollouts that are stopped, or that go on beside the training."""
    rollout, sglang = config.rollout, config.sglang
    if sglang.router and (rollout.over_sampling > 1 or rollout.max_staleness > 0):
        constraint = "sequences that may be stopped or interrupted are asked of servers themselves"
        yield Fault("sglang.router", "true", constraint, "set it to false, or take rounds as wholes")
    if sglang.router and rollout.router_replay:
        constraint = "sglang-router drops the field of a request that asks for the experts"
        yield Fault("sglang.router", "true", constraint, "set it to false, or rollout.router_replay=false")
    if sglang.release and rollout.max_staleness > 0:
        constraint = f"servers generate beside the training with rollout.max_staleness={rollout.max_staleness}"
        yield Fault("sglang.release", "true", constraint, "set one of them to its default")


def _check_hosts(config: Config, here: bool) -> Iterator[Fault]:
    sglang = config.sglang
    wanted = config.rollout.engines * sglang.nodes_per_engine
    if len(sglang.hosts) != wanted:
        constraint = f"must be one for each of rollout.engines x sglang.nodes_per_engine = {wanted} processes"
        yield Fault("sglang.hosts", f"{len(sglang.hosts)} of them", constraint, "name as many")
    words = shlex.split(sglang.remote or "")
    if not any("{host}" in word for word in words):
        constraint = "must say how a command is started on one of sglang.hosts, with {host} in it"
        yield Fault("sglang.remote", str(sglang.remote), constraint, "such as `ssh {host}`")
    elif here and shutil.which(words[0]) is None:
        yield Fault("sglang.remote", words[0], "is no program of this machine", "install it or name another")
    if sglang.weights_dir is None or not Path(sglang.weights_dir).is_absolute() or len(sglang.weights_dir.split()) != 1:
        constraint = "must be a folder that all sglang.hosts see, absolute and without blanks"
        yield Fault("sglang.weights_dir", str(sglang.weights_dir), constraint, "name one on a shared file system")


def _check_groups(config: Config) -> Iterator[Fault]:
    """What SGLang's update groups cannot do, where weights go over one."""
    sglang, device = config.sglang, config.device.type
    needed = {Transport.gloo: DeviceType.cpu, Transport.nccl: DeviceType.cuda}.get(sglang.transport)
    if needed is None:
        return
    if device is not needed:
        other = "nccl" if sglang.transport is Transport.gloo else "gloo"
        constraint = f"needs device.type={needed}, which is {device}"
        yield Fault("sglang.transport", str(sglang.transport), constraint, f"use {other}, ipc or disk")
    given = {argument.partition("=")[0] for argument in sglang.extra_args}
    for flag in ("--pp-size", "--pipeline-parallel-size"):
        if flag in given:
            constraint = f"stages of a server would take the same ranks of the group of {sglang.transport}"
            yield Fault("sglang.extra_args", flag, constraint, "leave it out, or use sglang.transport=disk")
