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
from r1mega.config.choices import DeviceType
from r1mega.config.registry import options
from r1mega.config.schema import Config
from r1mega.launch import preflight

SNAPSHOTS = Path(__file__).parent / "snapshots"
EXPERIMENTS = list(options()["experiment"])
OPTIONS = [(group, name) for group, names in options().items() for name in names if group != "experiment"]
V3, SFT = ("model", "deepseek_v3_671b"), [("stage", "sft"), ("data", "sft")]
GPU = ("device", "cuda_te")
# Options of other groups without which an option makes no sense.
COMPANIONS = {
    ("data", "sft"): [("stage", "sft")],
    **{("stage", name): [("data", "sft")] for name in ("sft", "cold_start_sft", "sft_800k", "distill")},
    ("stage", "evaluate"): [("benchmark", "file")],
    ("stage", "reward_model_helpful"): [("data", "pairs")],
    ("stage", "reward_model_safety"): [("data", "labels")],
    ("data", "pairs"): [("stage", "reward_model_helpful")],
    ("data", "labels"): [("stage", "reward_model_safety")],
    **{("sft", name): [*SFT, V3] for name in options()["sft"]},
    **{("parallel", name): [V3] for name in options()["parallel"] if "ep32" in name or "ep64" in name or "ep8" in name},
    ("parallel", "tp2_cp4"): [("model", "r1_distill_qwen_1_5b")],
    ("parallel", "tp4_cp2"): [("model", "r1_distill_qwen_7b")],
    ("parallel", "tp4_pp2"): [("model", "r1_distill_qwen_7b")],
    **{("parallel", f"tp8{rest}"): [("model", "qwen2_5_32b")] for rest in ("", "_dp2", "_pp2_dp2", "_pp2_dp4")},
    ("parallel", "tp8_pp4_dp2"): [("model", "r1_distill_llama_70b")],
    **{("curate", name): [("stage", "rejection_sampling")] for name in options()["curate"] if "few_shot" not in name},
    ("reward", "all_scenario_rl"): [("algo", "r1_reasoning"), V3, GPU],
    **{("sglang", name): [V3, GPU, ("rollout", "sglang")] for name in ("r1_671b", "r1_671b_64gpu")},
    ("sglang", "tp8_turns"): [GPU, ("rollout", "sglang")],
    ("precision", "fp8"): [GPU, V3],
    ("precision", "fp8_emulated"): [V3],
    ("precision", "bf16_v3"): [GPU],
}  # fmt: skip


def compare(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.yaml"
    if os.environ.get("R1MEGA_WRITE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"no snapshot {path.name}: run `make snapshots` and review it"
    assert text == path.read_text(), f"{path.name} differs: run `make snapshots` and review the difference"


def faults_of(config: Config, inputs) -> list[str]:
    """What the checks say of a configuration with sound input in the place of what the user must give.

    What needs GPUs, or a published model, is checked as for another machine.
    """
    train = getattr(inputs, str(config.data.format))
    held_out = train if config.stage.loop == "reward_model" else inputs.qa
    data = replace(config.data, train=str(train), eval=str(held_out) if config.data.eval else None)
    model = replace(config.model, hf=str(inputs.model))
    run, sglang = replace(config.run, dir=str(inputs.run)), replace(config.sglang, python=sys.executable)
    benchmark = replace(config.benchmark, data=str(inputs.qa))
    if config.stage.loop == "evaluate":
        benchmark = replace(benchmark, max_tokens=1024)  # the model at hand reads no more
    data = replace(data, general=str(inputs.qa) if config.data.general else None)
    models = {f"{name}_model" for name in ("helpful", "safety") if getattr(config.reward, f"{name}_model")}
    reward = replace(config.reward, **{field: str(inputs.score()) for field in models})
    here = config.model.card is None and config.device.type is DeviceType.cpu
    # A cluster on its own says nothing about the layout that fills it: test_pairs.py puts them together.
    sound = replace(config, data=data, model=model, run=run, sglang=sglang, benchmark=benchmark, reward=reward)
    return preflight.find(sound, here=here)


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}={name}" for group, name in OPTIONS])
def test_every_option_resolves_to_its_snapshot_and_passes_the_checks(
    section: Callable, defaults: Config, inputs, group: str, name: str
) -> None:
    compare(f"{group}.{name}", OmegaConf.to_yaml(OmegaConf.structured(section(group, name))))
    if group != "cluster":
        chosen = [(group, name), *COMPANIONS.get((group, name), [])]
        assert faults_of(replace(defaults, **{key: section(key, option) for key, option in chosen}), inputs) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves_to_its_snapshot_and_passes_the_checks(experiment, inputs, name: str) -> None:
    compare(f"experiment.{name}", io.to_yaml(experiment(name)))
    assert faults_of(experiment(name), inputs) == []


@pytest.fixture(scope="session")
def defaults(section: Callable) -> Config:
    """What composes where nothing is chosen; by the options that conf/config.yaml names."""
    config = Config()
    chosen = {
        "stage": "rl", "model": "load", "parallel": "single", "precision": "fp32", "device": "cpu",
        "memory": "standard", "data": "qa", "reward": "rule", "rollout": "embedded", "sglang": "standard",
        "algo": "grpo", "sft": "standard", "optim": "constant", "logger": "standard", "cluster": "local",
    }  # fmt: skip
    for group, name in chosen.items():
        setattr(config, group, section(group, name))
    config.run.dir = "runs/snapshot"
    return config


def test_the_defaults_compose_to_their_snapshot(composed: Callable[..., DictConfig], defaults: Config) -> None:
    config = io.typed(composed("run.dir=runs/snapshot"))
    compare("defaults", io.to_yaml(config))
    defaults = replace(defaults, model=replace(defaults.model, hf=""), data=replace(defaults.data, train=""))
    assert defaults == config


def test_an_option_gives_alone_what_it_gives_among_others(composed: Callable[..., DictConfig], section) -> None:
    for group, name in (("algo", "r1_zero"), ("parallel", "tp8_pp16_ep8"), ("sglang", "r1_671b")):
        config = io.typed(composed(f"{group}={name}", "run.dir=runs/snapshot"))
        assert getattr(config, group) == section(group, name)


def test_no_snapshot_is_left_over() -> None:
    expected = {f"{group}.{name}" for group, name in OPTIONS} | {f"experiment.{name}" for name in EXPERIMENTS}
    assert {path.stem for path in SNAPSHOTS.iterdir()} == expected | {"defaults"}


def test_r1_zero_has_the_published_arithmetic(section) -> None:
    algo = section("algo", "r1_zero")
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


def test_the_demo_runs_on_four_processes_with_every_cut(experiment) -> None:
    parallel = experiment("toy").parallel
    assert (parallel.tp, parallel.pp, parallel.ep, parallel.world_size) == (2, 2, 2, 4)
