"""Runs a world of ranks for one case of world.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1mega.launch import local
from r1mega.parallel.layout import Layout

WORLD = Path(__file__).with_name("world.py")


@pytest.fixture
def world(tmp_path: Path, nursery) -> Callable[..., Path]:
    """`world(case, hf, layout, *options)` runs the case to its end and returns what it wrote."""
    count = 0

    def run(case: str, hf: Path, layout: str, *options: Any) -> Path:
        nonlocal count
        count += 1
        out = tmp_path / f"{case}-{count}"
        argv = [sys.executable, str(WORLD), case, "--hf", hf, "--layout", layout, "--out", out, *options]
        result = nursery.run_world(
            [str(part) for part in argv],
            Layout.parse(layout).world_size,
            log_dir=tmp_path / f"logs-{count}",
            env=local.worker_env("cpu", 1),
        )
        assert result.exit_code == 0, result.message
        return out

    return run
