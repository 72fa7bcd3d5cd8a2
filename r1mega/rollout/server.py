"""How a stock SGLang server is started: its command line and its environment variables, for SGLang 0.5.21.

And how a router in front of several is. The only place that knows their flags. Pure functions over plain values:
nothing is started here, and neither torch nor SGLang is imported, since servers may live in a Python environment of
their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SGLANG_VERSION = "0.5.21"
ROUTER_VERSION = "0.3.2"  # of the package sglang-router
ROUTER_PAUSE_SECONDS = 5
DEVICES = ("cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
WEIGHTS, CACHE = "weights", "kv_cache"  # what a server can give back and take again, by SGLang's names
EVERYTHING = (WEIGHTS, CACHE)  # in the order it is taken


@dataclass(frozen=True)
class ServerOptions:
    """What SGLang offers besides, each off by default.

    Args:
        memory_saver: memory can be given back and taken again by tag; needs the package torch-memory-saver and CUDA.
        deterministic: kernels whose results do not depend on the batch; a request's seed then counts.
        kv_cache_dtype: of the cache, "auto" being the weights'.
        moe_a2a_backend: how tokens reach the ranks of their experts; "deepep" spans all ranks of a server.
        redundant_experts: copies of experts that a server holds besides, for balance.
        speculative_steps: tokens that the multi-token-prediction layer drafts ahead; 0 drafts none.
        routed_experts: requests may ask which experts were chosen; host memory of 4 bytes x cached tokens x layers x
            top_k.
    """

    memory_saver: bool = False
    deterministic: bool = False
    kv_cache_dtype: str = "auto"
    moe_a2a_backend: str = "none"
    redundant_experts: int = 0
    speculative_steps: int = 0
    routed_experts: bool = False

    def arguments(self) -> list[str]:
        """The flags that ask for it."""
        found = []
        if self.memory_saver:
            found.append("--enable-memory-saver")
        if self.deterministic:
            found.append("--enable-deterministic-inference")
        if self.kv_cache_dtype != "auto":
            found += ["--kv-cache-dtype", self.kv_cache_dtype]
        if self.moe_a2a_backend != "none":
            found += ["--moe-a2a-backend", self.moe_a2a_backend]
        if self.redundant_experts:
            found += ["--ep-num-redundant-experts", str(self.redundant_experts)]
        if self.speculative_steps:
            # One draft a step: a chain, which the layer of DeepSeek-V3 was trained for; one more is verified for free.
            found += ["--speculative-algorithm", "NEXTN", "--speculative-eagle-topk", "1"]
            found += ["--speculative-num-steps", str(self.speculative_steps)]
            found += ["--speculative-num-draft-tokens", str(self.speculative_steps + 1)]
        if self.routed_experts:
            found.append("--enable-return-routed-experts")
        return found


@dataclass(frozen=True)
class Part:
    """What of a server one of its nodes runs: an equal share of the ranks, on its GPUs from `first_gpu` on.

    All nodes meet at `rendezvous` (HOST:PORT of the first), which alone serves.
    """

    nodes: int = 1
    rank: int = 0
    rendezvous: str | None = None
    first_gpu: int = 0

    def flags(self, device: str) -> dict[str, object]:
        """The flags that say so. Raises ValueError on nodes that could not meet."""
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(f"rendezvous: {self.nodes} nodes need one")
        found: dict[str, object] = {}
        if self.nodes > 1:
            found |= {"--nnodes": self.nodes, "--node-rank": self.rank, "--dist-init-addr": self.rendezvous}
        if device == "cuda" and self.first_gpu:  # on a CPU it would choose cores, as server_env does
            found["--base-gpu-id"] = self.first_gpu
        return found


WHOLE = Part()


def server_command(
    *,
    python: str | Path,
    model_dir: str | Path,
    host: str,
    port: int,
    device: str,
    dtype: str,
    max_running_requests: int,
    mem_fraction: float,
    max_total_tokens: int | None = None,
    tp: int = 1,
    ep: int = 1,
    dp: int = 1,
    attn_dp: int = 1,
    part: Part = WHOLE,
    load_format: str = "auto",
    weight_version: str | None = None,
    options: ServerOptions | None = None,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The arguments that start one server, or the part of it that runs on one node.

    `python` is the interpreter of the environment that SGLang is installed in. `tp` ranks hold one copy of the model;
    `dp` copies stand behind the same address; `attn_dp` splits the attention of one copy by requests instead of heads,
    and `ep` its experts, both within the `tp` ranks.
    `max_total_tokens` bounds the KV cache where `mem_fraction` of the device's memory would be too much, as on a CPU.
    `load_format` dummy is for weights that arrive later.
    `extra_args` come last, and so win over what stands here.
    Raises ValueError on values that SGLang would refuse only after it has loaded, or take for something else.
    """
    _check(device, load_format, mem_fraction, tp=tp, ep=ep, dp=dp, attn_dp=attn_dp, nodes=part.nodes)
    flags: dict[str, object] = {
        "--model-path": model_dir,
        "--host": host,
        "--port": port,
        "--device": device,
        "--dtype": dtype,
        "--max-running-requests": max_running_requests,
        "--mem-fraction-static": mem_fraction,
        "--load-format": load_format,
        "--tp-size": tp,
        "--ep-size": ep,
        "--dp-size": max(dp, attn_dp),
    }
    if max_total_tokens is not None:
        flags["--max-total-tokens"] = max_total_tokens
    if weight_version is not None:
        flags["--weight-version"] = weight_version
    flags |= part.flags(device)
    command = [str(python), "-m", "sglang.launch_server", *_words(flags)]
    if device == "cpu":
        command += _without_gpu(sleeps=attn_dp == 1)
    if attn_dp > 1:
        # 0.5.21 has one number for both kinds of data parallelism, and this switch between them.
        command.append("--enable-dp-attention")
    return [*command, *(options or ServerOptions()).arguments(), *extra_args]


def _without_gpu(*, sleeps: bool) -> list[str]:
    # The only backend that needs neither a GPU nor AMX instructions.
    flags = ["--attention-backend", "torch_native"]
    # A scheduler with nothing to do asks for work without end otherwise, on cores that the trainer needs. The parts of
    # a split attention wait for each other in every step, and each would sleep for up to a second.
    return [*flags, "--sleep-on-idle"] if sleeps else flags


def _words(flags: dict[str, object]) -> list[str]:
    return [word for flag, value in flags.items() for word in (flag, str(value))]


def server_env(*, device: str, num_ranks: int = 1, first_rank: int = 0) -> dict[str, str]:
    """The variables to set for a server of `num_ranks` (tp x dp) processes, over the environment of the caller.

    `first_rank` is the first of them that is started with these variables, where they are started apart.
    """
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, must be one of {', '.join(DEVICES)}")
    # The trainer's packages must not shadow those of the engine's environment.
    # /health would generate a token, which ends a server whose memory is given back, or that flushes its cache at that
    # moment. Whether the scheduler is alive is asked at /server_info.
    env = {"PYTHONPATH": "", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if device == "cuda":
        return env
    env |= {
        # Without it SGLang takes a machine without GPU for an unknown platform.
        "SGLANG_USE_CPU_ENGINE": "1",
        # A model's first request would otherwise compile for 11-19 s.
        "TORCHDYNAMO_DISABLE": "1",
        # More threads than free cores wait for each other: measured 0.13 s a step became 14-21 s.
        "OMP_NUM_THREADS": "1",
    }
    if num_ranks > 1:
        # Without it SGLang refuses more ranks than the machine has NUMA nodes. One core a rank, in turn.
        cores = os.cpu_count() or 1
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str((first_rank + rank) % cores) for rank in range(num_ranks))
    return env


def router_command(
    *,
    python: str | Path,
    host: str,
    port: int,
    metrics_port: int,
    urls: Sequence[str],
    policy: str,
    startup_seconds: float,
) -> list[str]:
    """The arguments that start a router (sglang-router 0.3.2) in front of the servers at `urls`.

    It serves at once, and takes each server in when that first answers, within `startup_seconds`.
    """
    flags: dict[str, object] = {
        "--host": host,
        "--port": port,
        "--policy": policy,
        "--prometheus-host": host,
        "--prometheus-port": metrics_port,
        "--log-level": "warn",
        "--worker-startup-timeout-secs": math.ceil(startup_seconds),
        "--worker-startup-check-interval": 1,
        # How long a sequence may take is for who watches the servers to say; its own limit is 1,800 s.
        "--request-timeout-secs": 7 * 24 * 3600,
        # Loading weights makes a server silent. It is to be asked for sequences again at once when it answers; with the
        # router's own minute between two checks, and two of them to pass, each publish would cost two minutes.
        "--health-check-interval-secs": 2,
        "--health-check-timeout-secs": 30,
        "--health-failure-threshold": 2,
        "--health-success-threshold": 1,
        # A server that refuses connections is passed over after three, and asked again after this.
        "--cb-failure-threshold": 3,
        "--cb-success-threshold": 1,
        "--cb-timeout-duration-secs": ROUTER_PAUSE_SECONDS,
    }
    command = [str(python), "-m", "sglang_router.launch_router", *_words(flags)]
    # Who asks for a sequence counts its attempts, and checks the weights of each answer.
    return [*command, "--disable-retries", "--worker-urls", *urls]


def _check(device: str, load_format: str, mem_fraction: float, **sizes: int) -> None:
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, must be one of {', '.join(DEVICES)}")
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format: got {load_format!r}, must be one of {', '.join(LOAD_FORMATS)}")
    if not 0 < mem_fraction < 1:
        raise ValueError(f"mem_fraction: got {mem_fraction}, must lie between 0 and 1")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, must be at least 1")
    tp = sizes["tp"]
    for name in ("ep", "attn_dp", "nodes"):
        if tp % sizes[name]:
            raise ValueError(f"{name}: got {sizes[name]}, must divide tp, which is {tp}")
    if sizes["dp"] > 1 and sizes["attn_dp"] > 1:
        raise ValueError(
            f"dp: got {sizes['dp']} with attn_dp {sizes['attn_dp']}; SGLang 0.5.21 splits either whole copies or the"
            " attention of one. Start more servers instead of dp"
        )
