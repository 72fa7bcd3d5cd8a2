"""Transformer Engine's FP8 at every kind of layout, the ranks beside each other on one GPU.

Two layouts in FP8 cannot be compared number by number: bf16 sums in another order round operands the other way. How far
each is from fp32 can: every parameter's gradient must be about as far as on one rank.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parity.tiny_checkpoints import FP8_SHAPES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
SCRIPT = Path(__file__).resolve().parents[1] / "parity" / "fp8_ranks.py"
# What tensor ranks gather goes in whole blocks of 128.
SHAPES = FP8_SHAPES | {"deepseek_v3": FP8_SHAPES["deepseek_v3"] | {"kv_lora_rank": 128}}
TE_FP8 = {"fp8": True, "layer_spec": "te", "params_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def gradients(checkpoint, tmp_path_factory) -> Callable[..., dict]:
    """`gradients(family, layout, **options)` -> of each parameter, each asked once."""
    import torch

    from r1mega.launch import local, supervise
    from r1mega.parallel.layout import Layout

    made: dict[str, dict] = {}

    def ask(family: str, layout: str, **options: object) -> dict:
        told = json.dumps({"device": "cuda"} | options)
        key = f"{family} {layout} {told}"
        if key not in made:
            folder = tmp_path_factory.mktemp("fp8")
            argv = [sys.executable, SCRIPT, checkpoint(family, **SHAPES[family]), layout, folder / "out.pt", told]
            size = Layout.parse(layout).world_size
            result = supervise.run_world(
                [str(part) for part in argv], size, log_dir=folder, env=local.worker_env("cuda", 1)
            )
            assert result.exit_code == 0, result.message
            made[key] = torch.load(folder / "out.pt")["gradients"]
        return made[key]

    return ask


def errors(gradients: Callable[..., dict], family: str, layout: str, **options: object) -> dict[str, float]:
    """Of each parameter's gradient in FP8, how far it is from fp32's of one rank."""
    exact, found = gradients(family, "1"), gradients(family, layout, **TE_FP8, **options)
    assert found.keys() == exact.keys()
    return {name: float((found[name] - value).norm() / value.norm().clamp(min=1e-20)) for name, value in exact.items()}


def ratios(gradients: Callable[..., dict], family: str, layout: str, **options: object) -> list[float]:
    """How many times as far as on one rank, smallest first."""
    alone, found = errors(gradients, family, "1"), errors(gradients, family, layout, **options)
    return sorted(found[name] / error for name, error in alone.items() if error > 0)


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen2", "tp=2,pp=2"), ("qwen2", "tp=2,dp=2"), ("deepseek_v3", "tp=2,ep=2"), ("deepseek_v3", "ep=2,dp=2")],
)
def test_gradients_are_as_far_from_fp32_as_on_one_rank(gradients, family, layout):
    """Of the median parameter, and of each; two sound runs on a CPU have 0.99 to 1.04, and 0.80 to 1.41."""
    found = ratios(gradients, family, layout)
    print(family, layout, found[0], statistics.median(found), found[-1])
    assert 0.9 < statistics.median(found) < 1.1
    assert found[0] > 0.5 and found[-1] < 2


def test_a_missing_reduction_is_noticed(gradients):
    assert ratios(gradients, "deepseek_v3", "tp=2,ep=2", broken="layernorm_reduction")[-1] > 2.5
