"""Every layout on one GPU, its ranks beside each other on it, against transformers on one process on the CPU.

NCCL takes no two ranks of a GPU, so what they exchange goes through the host (`parallel.shared_gpu`); all else is what
runs on as many GPUs: Megatron-Core's own CUDA paths, Transformer Engine's layers, its attention over cp ranks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity import cells

TOOL = Path(__file__).resolve().parents[2] / "tools" / "parity_matrix.py"
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


def matrix(out: Path, *options: str) -> tuple[int, list[dict]]:
    """Exit code and cells of the program on this GPU, products of fp32 without TF32."""
    argv = [sys.executable, str(TOOL), "--device", "cuda", "--share-gpu", "--json", str(out), *options]
    env = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
    result = subprocess.run(argv, capture_output=True, text=True, timeout=290, env=env)
    print(result.stdout)
    assert out.exists(), result.stderr
    return result.returncode, json.loads(out.read_text())


def assert_green(found: list[dict], least: int) -> None:
    compared = [cell for cell in found if "refused" not in cell]
    assert len(compared) >= least
    assert [cells.line(cell) for cell in compared if not cells.is_green(cell)] == []


@needs_te
@pytest.mark.parametrize(("family", "least"), [("deepseek_v3_mtp", 6), ("deepseek_v3", 2), ("qwen2", 2), ("llama", 4)])
def test_layouts_of_transformer_engine(tmp_path, family, least):
    """fp32: over cp ranks its attention has no kernels for it."""
    options = ("--core", "--layer-spec", "te", "--levers", "without", "--families", family)
    assert_green(matrix(tmp_path / "cells.json", *options)[1], least)


@needs_te
@pytest.mark.parametrize("family", cells.FAMILIES)
def test_levers_of_transformer_engine(tmp_path, family):
    """Also its attention over cp ranks, in bf16."""
    found = matrix(tmp_path / "cells.json", "--layer-spec", "te", "--levers", "only", "--families", family)[1]
    assert_green(found, sum(name == family for name, _, _ in cells.TE_LEVERS))


@needs_te
def test_a_missing_reduction_is_noticed(tmp_path):
    options = ("--layer-spec", "te", "--families", "qwen2", "--layouts", "tp=2", "--break", "layernorm_reduction")
    exit_code, found = matrix(tmp_path / "cells.json", *options)
    assert exit_code == 1
    assert found[0]["max_rel_grad_diff"] > 10 * cells.MAX_GRADIENT_DIFF


@needs_te
def test_slices_that_its_attention_cuts_otherwise_are_noticed(tmp_path):
    options = ("--layer-spec", "te", "--levers", "only", "--families", "deepseek_v3_replay", "--break", "plain_slices")
    exit_code, found = matrix(tmp_path / "cells.json", *options)
    assert exit_code == 1 and len(found) == 2
    assert all(cell["max_rel_grad_diff"] > 2 * cells.BF16_SLACK["max_rel_grad_diff"] for cell in found)


@pytest.mark.parametrize("family", ["deepseek_v3_mtp", "qwen2"])
def test_layouts_of_torch_layers(tmp_path, family):
    found = matrix(tmp_path / "cells.json", "--core", "--levers", "without", "--families", family)[1]
    assert_green(found, 4)
