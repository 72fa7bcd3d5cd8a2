"""Every file of conf/ composes, passes the checks, and resolves to a reviewed snapshot.

`make snapshots` writes the snapshots anew; their difference is part of the review of any change to conf/ or the schema.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from r1mega.config import io
from r1mega.config.faults import ConfigError
from r1mega.config.registry import options
from r1mega.launch import preflight

SNAPSHOTS = Path(__file__).parent / "snapshots"
OPTIONS = [(group, name) for group, names in options().items() for name in names]
# The option of another group without which an option makes no sense.
COMPANIONS = {
    ("stage", "sft"): ["data=sft"],
    ("data", "sft"): ["stage=sft"],
    ("stage", "reward_model_helpful"): ["data=pairs"],
    ("stage", "reward_model_safety"): ["data=labels"],
    ("data", "pairs"): ["stage=reward_model_helpful"],
    ("data", "labels"): ["stage=reward_model_safety"],
}
# Options that a machine without a GPU refuses, and what every fault then names.
REFUSED = {("precision", "fp8"): "precision.fp8"}


def compare(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.yaml"
    if os.environ.get("R1MEGA_WRITE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"no snapshot {path.name}: run `make snapshots` and review it"
    assert text == path.read_text(), f"{path.name} differs: run `make snapshots` and review the difference"


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}={name}" for group, name in OPTIONS])
def test_every_option_resolves_to_its_snapshot_and_passes_the_checks(
    composed: Callable[..., DictConfig], inputs, group: str, name: str
) -> None:
    overrides = [f"{group}={name}", *COMPANIONS.get((group, name), []), "run.dir=runs/snapshot"]
    config = io.typed(composed(*overrides))
    whole = OmegaConf.structured(config)
    compare(f"{group}.{name}", OmegaConf.to_yaml(whole if group == "experiment" else whole[group]))
    # Sound input in the place of the files that the option names, or that the user must give.
    train = getattr(inputs, str(config.data.format))
    data = replace(config.data, train=str(train), eval=str(inputs.qa) if config.data.eval else None)
    model = replace(config.model, hf=str(inputs.model))
    run, sglang = replace(config.run, dir=str(inputs.run)), replace(config.sglang, python=sys.executable)
    sound = replace(config, data=data, model=model, run=run, sglang=sglang)
    if (group, name) in REFUSED:
        with pytest.raises(ConfigError) as refused:
            preflight.require(sound, ())
        assert all(str(fault).startswith(REFUSED[group, name]) for fault in refused.value.faults)
    else:
        preflight.require(sound, ())


def test_the_defaults_compose_to_their_snapshot(composed: Callable[..., DictConfig]) -> None:
    compare("defaults", io.to_yaml(io.typed(composed("run.dir=runs/snapshot"))))


def test_no_snapshot_is_left_over() -> None:
    expected = {f"{group}.{name}" for group, name in OPTIONS} | {"defaults"}
    assert {path.stem for path in SNAPSHOTS.iterdir()} == expected


def test_r1_zero_has_the_published_arithmetic(composed: Callable[..., DictConfig]) -> None:
    algo = io.typed(composed("algo=r1_zero")).algo
    # arXiv 2501.12948v2: 8,192 outputs a rollout, 512 sequences and 32 questions a step, 10,400 steps = 650 rollouts.
    assert algo.samples_per_round == 8192
    assert algo.samples_per_round // algo.updates_per_round == 512
    assert algo.questions_per_round // algo.updates_per_round == 32
    assert algo.updates // algo.updates_per_round == 650
    assert (algo.group_size, algo.kl_coef, algo.reference_refresh) == (16, 0.001, 400)


def test_four_updates_of_gsm8k_are_two_rounds(composed: Callable[..., DictConfig], inputs) -> None:
    config = io.typed(composed("experiment=r1_zero_gsm8k", "algo.updates=4", *inputs.overrides()))
    preflight.require(config, ())
    assert config.algo.updates // config.algo.updates_per_round == 2
    assert config.parallel.world_size == 1
    assert config.optim.lr == 3e-6


def test_the_demo_runs_on_four_processes_with_every_cut(composed: Callable[..., DictConfig]) -> None:
    parallel = io.typed(composed("experiment=toy")).parallel
    assert (parallel.tp, parallel.pp, parallel.ep, parallel.world_size) == (2, 2, 2, 4)
