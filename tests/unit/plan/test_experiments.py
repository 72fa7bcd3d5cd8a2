"""Every experiment at full scale on the cluster that it ships with: it fits, and takes what docs/plan.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1mega.config.registry import options
from r1mega.plan import run

DOCS = Path(__file__).resolve().parents[3] / "docs" / "plan.md"
# For the machine that they run on.
SMALL = {"r1_zero_gsm8k", *(name for name in options()["experiment"] if name.split("_")[0] == "toy")}


def documented() -> dict[str, list[str]]:
    """experiment -> the cells of its row in docs/plan.md."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", DOCS.read_text("utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_table_has_every_experiment():
    assert set(documented()) == set(options()["experiment"]) - SMALL


@pytest.mark.parametrize("name", list(documented()))
def test_it_fits_its_own_cluster(plan_of, name):
    code, found = plan_of(f"experiment={name}")
    assert code == 0, found["misfits"]
    peak = found["device_peak"]
    seconds = found["seconds_per_update"]
    said = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"
    assert documented()[name] == [
        str(found["num_gpus"]), peak["phase"], f"{peak['bytes'] / 2**30:.1f}", f"{found['updates']:,}", said,
    ]  # fmt: skip
    assert found["fits"] and found["headroom_bytes"] > 0


@pytest.mark.parametrize(
    ("overrides", "phase"),
    [
        (["experiment=r1_zero", "sglang=r1_671b", "rollout.engines=16"], "checkpoint"),
        (["experiment=sft_800k", "parallel.overlap_grad_reduce=false"], "checkpoint"),
        (["experiment=r1_zero", "memory.offload=false"], "rollout"),
        (["experiment=evaluate_r1", "sglang.memory_fraction=0.6"], "rollout"),
    ],
)
def test_what_they_were_changed_for(plan_of, monkeypatch, overrides, phase):
    """Without a lever that a comment in conf/ gives a reason for, it does not fit."""
    monkeypatch.setattr(run, "suggestions", lambda _found: [])
    code, found = plan_of(*overrides)
    assert code == 1
    assert any(line.startswith(f"{phase}: ") for line in found["misfits"])


def test_servers_twice_as_wide_are_what_r1_zero_is_advised(plan_of):
    """Of servers of 32 GPUs, whose experts and copies of them twice as many ranks divide."""
    _, found = plan_of("experiment=r1_zero", "sglang=r1_671b", "rollout.engines=16")
    fitting = [line for line in found["suggestions"] if ": fits; " in line]
    assert any("sglang.tp=64 sglang.ep=64 sglang.redundant_experts=64" in line for line in fitting)
