from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from r1mega.config import io
from r1mega.config.choices import Loop
from r1mega.config.faults import ConfigError
from r1mega.config.schema import Config

# Every field that the schema leaves open.
GIVEN = {
    "run": {"dir": "runs/x"},
    "stage": {"loop": "rl"},
    "model": {"hf": "hf", "init": "load"},
    "precision": {"params": "bf16"},
    "device": {"type": "cpu"},
    "data": {"train": "t.jsonl", "format": "qa"},
    "rollout": {"engine": "embedded"},
}


def without(*keys: str) -> DictConfig:
    given = OmegaConf.create(GIVEN)
    for key in keys:
        OmegaConf.update(given, key, "???")
    return given


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    changed = {"rollout": {"engine": "embedded", "stop": ["</answer>"]}, "optim": {"lr": 3e-6}, "data": {"eval": None}}
    config = io.typed(OmegaConf.merge(GIVEN, changed))
    (tmp_path / "config.yaml").write_text(io.to_yaml(config))
    again = io.load(tmp_path / "config.yaml")
    assert again == config
    assert isinstance(again, Config)
    assert again.stage.loop is Loop.rl
    assert (again.optim.lr, again.rollout.stop, again.data.eval) == (3e-6, ["</answer>"], None)
    assert again.parallel.world_size == 1


def test_interpolations_are_resolved() -> None:
    config = io.typed(OmegaConf.merge(GIVEN, {"run": {"name": "n", "dir": "runs/${run.name}-${run.seed}"}}))
    assert config.run.dir == "runs/n-0"


def test_a_text_that_nobody_gave_is_left_to_the_checks() -> None:
    config = io.typed(without("model.hf", "run.dir"))
    assert (config.model.hf, config.run.dir, config.data.train) == ("", "", "t.jsonl")


def test_options_that_nobody_chose_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        io.typed(without("stage.loop", "device.type", "model.hf"))
    assert [fault.field for fault in caught.value.faults] == ["device.type", "stage.loop"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"algo": {"group_sise": 4}}, "algo.group_sise"),
        ({"nonsense": {"a": 1}}, "nonsense"),
        ({"algo": {"group_size": "many"}}, "algo.group_size"),
        ({"stage": {"loop": "dream"}}, "stage.loop"),
        ({"run": {"dir": "${nowhere.to.be.found}"}}, "run.dir"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(values: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        io.typed(OmegaConf.merge(GIVEN, values))
    assert caught.value.faults[0].field == field


def test_keys_forced_into_a_typed_configuration_are_refused() -> None:
    forced = OmegaConf.merge(OmegaConf.structured(Config), GIVEN)
    OmegaConf.update(forced, "algo.extra", 1, force_add=True)
    with pytest.raises(ConfigError, match=r"algo\.extra"):
        io.typed(forced)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        io.load(path)
    with pytest.raises(ConfigError, match="absent.yaml"):
        io.load(tmp_path / "absent.yaml")
