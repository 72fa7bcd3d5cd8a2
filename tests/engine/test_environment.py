"""The environment of SGLang itself, without a server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from r1mega.rollout.server import ServerOptions, server_command, server_env


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | server_env(device="cpu")
    return subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=240)


def test_patches_of_another_version_end_the_process(sglang_python: Path) -> None:
    """SGLang itself logs what goes wrong in a plugin, and serves on without it."""
    code = (
        "from r1mega_sglang_cpu import plugin; plugin.SGLANG = '0.5.99'\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()"
    )
    result = run(sglang_python, code)
    assert result.returncode != 0
    assert "patches SGLang 0.5.99, found 0.5.21; install that version" in result.stderr


def test_every_flag_is_sglangs_own(sglang_python: Path) -> None:
    """The whole command line, read by SGLang's own parser, which no renamed flag passes."""
    options = ServerOptions(True, True, "fp8_e4m3", "deepep", 16, 2)
    command = server_command(
        python=sglang_python, model_dir="models/m", host="127.0.0.1", port=30000, device="cpu", dtype="float32",
        max_running_requests=64, mem_fraction=0.3, max_total_tokens=16384, tp=4, ep=4, attn_dp=2, load_format="dummy",
        weight_version="7", options=options,
    )  # fmt: skip
    result = run(
        sglang_python,
        "import argparse, json; from sglang.srt.server_args import ServerArgs\n"
        "parser = argparse.ArgumentParser(allow_abbrev=False); ServerArgs.add_cli_args(parser)\n"
        f"print(json.dumps(vars(parser.parse_args({command[3:]!r})), default=str))",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "model_path": "models/m", "host": "127.0.0.1", "port": 30000, "device": "cpu", "dtype": "float32",
        "max_running_requests": 64, "mem_fraction_static": 0.3, "max_total_tokens": 16384, "tp_size": 4, "ep_size": 4,
        "dp_size": 2, "enable_dp_attention": True, "load_format": "dummy", "weight_version": "7",
        "attention_backend": "torch_native", "enable_memory_saver": True, "enable_deterministic_inference": True,
        "kv_cache_dtype": "fp8_e4m3", "moe_a2a_backend": "deepep", "ep_num_redundant_experts": 16,
        "speculative_algorithm": "NEXTN", "speculative_eagle_topk": 1, "speculative_num_steps": 2,
        "speculative_num_draft_tokens": 3,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    renamed = run(
        sglang_python,
        "import argparse; from sglang.srt.server_args import ServerArgs\n"
        "parser = argparse.ArgumentParser(allow_abbrev=False); ServerArgs.add_cli_args(parser)\n"
        "parser.parse_args(['--model-path', 'm', '--enable-memory-save'])",
    )
    assert renamed.returncode == 2 and "unrecognized arguments: --enable-memory-save" in renamed.stderr


def test_torchvision_imports(sglang_python: Path) -> None:
    result = run(sglang_python, "import torchvision.transforms; print(torchvision.__version__)")
    assert result.returncode == 0, result.stderr
