"""How a stock SGLang server is started: its command line and its environment variables, for SGLang 0.5.21.

The only place that knows SGLang's flags. Pure functions over plain values: nothing is started here, and neither torch
nor SGLang is imported, since the server may live in a Python environment of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

SGLANG_VERSION = "0.5.21"
DEVICES = ("cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")


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
    load_format: str = "auto",
    weight_version: str | None = None,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The arguments that start one server.

    `python` is the interpreter of the environment that SGLang is installed in. `tp` ranks hold one copy of the model;
    `dp` copies stand behind the same address; `attn_dp` splits the attention of one copy by requests instead of heads,
    and `ep` its experts, both within the `tp` ranks. `max_total_tokens` bounds the KV cache where `mem_fraction` of the
    device's memory would be too much, as on a CPU. `load_format` dummy is for weights that arrive later.
    `extra_args` come last, and so win over what stands here.
    Raises ValueError on values that SGLang would refuse only after it has loaded, or take for something else.
    """
    _check(device, load_format, mem_fraction, tp=tp, ep=ep, dp=dp, attn_dp=attn_dp)
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
    if device == "cpu":
        # The only backend that needs neither a GPU nor AMX instructions.
        flags["--attention-backend"] = "torch_native"
    command = [str(python), "-m", "sglang.launch_server"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    if attn_dp > 1:
        # 0.5.21 has one number for both kinds of data parallelism, and this switch between them.
        command.append("--enable-dp-attention")
    return [*command, *extra_args]


def server_env(*, device: str, num_ranks: int = 1) -> dict[str, str]:
    """The variables to set for a server of `num_ranks` (tp x dp) processes, over the environment of the caller."""
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, must be one of {', '.join(DEVICES)}")
    # The trainer's packages must not shadow those of the engine's environment.
    env = {"PYTHONPATH": ""}
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
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % cores) for rank in range(num_ranks))
    return env


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
    for name in ("ep", "attn_dp"):
        if tp % sizes[name]:
            raise ValueError(f"{name}: got {sizes[name]}, must divide tp, which is {tp}")
    if sizes["dp"] > 1 and sizes["attn_dp"] > 1:
        raise ValueError(
            f"dp: got {sizes['dp']} with attn_dp {sizes['attn_dp']}; SGLang 0.5.21 splits either whole copies or the"
            " attention of one. Start more servers instead of dp"
        )
