"""The formula of activations says what autograd saves, tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.models.hf_fields import parse
from r1mega.parallel.layout import Layout
from r1mega.plan.activations import Compute, Layers, Pack

SCRIPT = Path(__file__).with_name("saved_tensors.py")
TOLERANCE = 0.01  # places of rows, and counts of a few bytes a token


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def estimate(case: dict, **changes: object) -> float:
    fields = parse(case["model"])
    options = case["options"]
    compute = Compute(
        itemsize={"bf16": 2, "fp32": 4}[case["params"]],
        recompute=options.get("recompute", "none"),
        recompute_modules=tuple(options.get("recompute_modules", ())),
        recompute_num_layers=options.get("recompute_num_layers", 1),
        on_cpu=True,
    )
    layers = Layers(fields, Layout(), replace(compute, **changes))
    lengths = case["lengths"]
    pack = Pack.of(lengths, sum(length - length // 4 for length in lengths))
    total = sum(term.nbytes for term in (*layers.head(pack), *layers.tail(pack)))
    for layer in range(fields["num_hidden_layers"]):
        total += layers.saved(pack, moe=layer in fields.moe_layers)
    return total


def test_every_case_is_what_autograd_saves(cases):
    wrong = {
        case["name"]: estimate(case) / case["bytes"] - 1
        for case in cases
        if abs(estimate(case) / case["bytes"] - 1) > TOLERANCE
    }
    assert len(cases) == 17
    assert wrong == {}


@pytest.mark.parametrize(
    "changes",
    [{"itemsize": 4}, {"recompute": "none"}, {"on_cpu": False}, {"recompute": "full"}, {"layer_spec": "te"}],
    ids=str,
)
def test_another_model_of_memory_is_told_apart(cases, changes):
    other = [abs(estimate(case, **changes) / case["bytes"] - 1) > 5 * TOLERANCE for case in cases]
    assert any(other)
