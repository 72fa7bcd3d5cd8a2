"""The environment of SGLang itself, without a server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from r1mega.rollout.server import server_env


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


def test_torchvision_imports(sglang_python: Path) -> None:
    result = run(sglang_python, "import torchvision.transforms; print(torchvision.__version__)")
    assert result.returncode == 0, result.stderr
