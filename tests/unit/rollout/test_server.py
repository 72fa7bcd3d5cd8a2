from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from r1mega.rollout import server

_REQUIRED: dict[str, Any] = {
    "python": "env/bin/python", "model_dir": "models/m", "host": "127.0.0.1", "port": 30000, "device": "cpu",
    "dtype": "float32", "max_running_requests": 64, "mem_fraction": 0.3,
}  # fmt: skip


def values(command: list[str]) -> dict[str, str]:
    """The value that follows each flag."""
    return {flag: value for flag, value in zip(command, command[1:], strict=False) if flag.startswith("--")}


def test_a_server_on_cpu() -> None:
    command = server.server_command(**_REQUIRED, max_total_tokens=16384, weight_version="7")
    assert command[:3] == ["env/bin/python", "-m", "sglang.launch_server"]
    assert values(command) == {
        "--model-path": "models/m", "--host": "127.0.0.1", "--port": "30000", "--device": "cpu", "--dtype": "float32",
        "--max-running-requests": "64", "--mem-fraction-static": "0.3", "--load-format": "auto", "--tp-size": "1",
        "--ep-size": "1", "--dp-size": "1", "--max-total-tokens": "16384", "--weight-version": "7",
        "--attention-backend": "torch_native",
    }  # fmt: skip
    assert "--sleep-on-idle" in command and all(isinstance(argument, str) for argument in command)


def test_a_gpu_keeps_its_own_attention_and_threads() -> None:
    flags = values(server.server_command(**{**_REQUIRED, "device": "cuda"}))
    assert "--sleep-on-idle" not in server.server_command(**{**_REQUIRED, "device": "cuda"})
    assert "--attention-backend" not in flags and "--max-total-tokens" not in flags and "--weight-version" not in flags
    assert server.server_env(device="cuda", num_ranks=8) == {
        "PYTHONPATH": "", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"
    }  # fmt: skip


def test_parallel_sizes() -> None:
    command = server.server_command(**_REQUIRED, tp=4, ep=2, attn_dp=2)
    assert {flag: values(command)[flag] for flag in ("--tp-size", "--ep-size", "--dp-size")} == {
        "--tp-size": "4", "--ep-size": "2", "--dp-size": "2"
    }  # fmt: skip
    assert "--enable-dp-attention" in command and "--sleep-on-idle" not in command
    copies = server.server_command(**_REQUIRED, dp=2)
    assert values(copies)["--dp-size"] == "2" and "--enable-dp-attention" not in copies


def test_the_part_of_a_server_on_one_node() -> None:
    command = server.server_command(**_REQUIRED, tp=16, part=server.Part(2, 1, "a:30001"))
    found = values(command)
    assert (found["--nnodes"], found["--node-rank"], found["--dist-init-addr"]) == ("2", "1", "a:30001")
    assert "--nnodes" not in server.server_command(**_REQUIRED, tp=16)


def test_the_gpus_of_a_server() -> None:
    on_gpus = {**_REQUIRED, "device": "cuda", "tp": 2}
    assert values(server.server_command(**on_gpus, part=server.Part(first_gpu=4)))["--base-gpu-id"] == "4"
    assert "--base-gpu-id" not in server.server_command(**on_gpus)
    # On a CPU the number would choose cores, which server_env has chosen.
    assert "--base-gpu-id" not in server.server_command(**_REQUIRED, tp=2, part=server.Part(first_gpu=4))


def test_a_router() -> None:
    command = server.router_command(
        python="env/bin/python", host="127.0.0.1", port=30000, metrics_port=30001, urls=["http://a:1", "http://b:2"],
        policy="round_robin", startup_seconds=1800.5,
    )  # fmt: skip
    assert command[:3] == ["env/bin/python", "-m", "sglang_router.launch_router"]
    assert command[-4:] == ["--disable-retries", "--worker-urls", "http://a:1", "http://b:2"]
    found = values(command)
    assert found["--policy"] == "round_robin" and found["--worker-startup-timeout-secs"] == "1801"
    assert int(found["--request-timeout-secs"]) >= 24 * 3600  # 32,768 tokens take hours on a loaded server


def test_options_are_off_until_asked_for() -> None:
    assert server.ServerOptions().arguments() == []
    every = server.ServerOptions(True, True, "fp8_e4m3", "deepep", 16, 2, True)
    command = server.server_command(**_REQUIRED, options=every, extra_args=("--x",))
    assert command[command.index("--enable-memory-saver") :] == [
        "--enable-memory-saver", "--enable-deterministic-inference", "--kv-cache-dtype", "fp8_e4m3",
        "--moe-a2a-backend", "deepep", "--ep-num-redundant-experts", "16", "--speculative-algorithm", "NEXTN",
        "--speculative-eagle-topk", "1", "--speculative-num-steps", "2", "--speculative-num-draft-tokens", "3",
        "--enable-return-routed-experts", "--x",
    ]  # fmt: skip


def test_extra_arguments_come_last() -> None:
    assert server.server_command(**_REQUIRED, extra_args=("--dtype", "bfloat16"))[-2:] == ["--dtype", "bfloat16"]


def test_each_rank_of_several_gets_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.os, "cpu_count", lambda: 2)
    assert server.server_env(device="cpu", num_ranks=3)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|0"
    second = server.server_env(device="cpu", num_ranks=2, first_rank=1)  # of two nodes, the other one here
    assert second["SGLANG_CPU_OMP_THREADS_BIND"] == "1|0"
    alone = server.server_env(device="cpu")
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in alone and alone["SGLANG_USE_CPU_ENGINE"] == "1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"load_format": "fast"}, "load_format: got 'fast'"),
        ({"mem_fraction": 1.0}, "mem_fraction: got 1.0"),
        ({"tp": 0}, "tp: got 0"),
        ({"tp": 4, "ep": 3}, "ep: got 3, must divide tp, which is 4"),
        ({"tp": 2, "attn_dp": 4}, "attn_dp: got 4, must divide tp"),
        ({"tp": 4, "part": server.Part(3, 0, "a:1")}, "nodes: got 3, must divide tp"),
        ({"tp": 4, "part": server.Part(2)}, "rendezvous: 2 nodes need one"),
        ({"tp": 2, "dp": 2, "attn_dp": 2}, "dp: got 2 with attn_dp 2"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server.server_command(**{**_REQUIRED, **change})


def test_an_unknown_device_has_no_environment() -> None:
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        server.server_env(device="tpu")


def test_the_module_needs_neither_torch_nor_sglang() -> None:
    code = "import sys, r1mega.rollout.server; assert not {'torch', 'sglang', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
