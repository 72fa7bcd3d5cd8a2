from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config.check_stage import STARTS_FROM, check_stage, stage_of
from r1mega.config.registry import options
from r1mega.config.schema import Config


def a_run(place: Path, stage: str | None) -> Path:
    for name in ("hf", "checkpoints/update-000002"):
        (place / name).mkdir(parents=True)
    (place / "config.yaml").write_text(f"stage:\n  name: {stage or 'null'}\n")
    return place


def faults(stage: str | None, model: Path, **run: object) -> list[str]:
    config = Config()
    config.stage.name, config.model.hf = stage, str(model)
    for name, value in run.items():
        setattr(config.run, name, value)
    return [str(fault) for fault in check_stage(config)]


@pytest.mark.parametrize("model", ["hf", "checkpoints/update-000002"])
@pytest.mark.parametrize(
    ("before", "stage", "is_right"),
    [
        ("cold_start_sft", "reasoning_rl", True),
        ("sft_800k", "all_scenario_rl", True),
        ("reasoning_rl", "rejection_sampling", True),
        (None, "reasoning_rl", True),
        ("reasoning_rl", "sft_800k", False),
        ("reasoning_rl", "all_scenario_rl", False),
        ("r1_zero", "distill", False),
        ("all_scenario_rl", "evaluate", True),
    ],
)
def test_the_order_of_stages(tmp_path: Path, before: str | None, stage: str, is_right: bool, model: str) -> None:
    found = faults(stage, a_run(tmp_path / "run", before) / model)
    assert bool(found) is not is_right
    if found:
        assert f"of stage {before}; stage {stage} starts from " in found[0]


def test_what_is_no_run_says_nothing(tmp_path: Path) -> None:
    assert stage_of(tmp_path / "hf") is None and faults("sft_800k", tmp_path / "hf") == []
    (tmp_path / "config.yaml").write_text("- a list\n")
    assert faults("sft_800k", tmp_path / "hf") == []


def test_a_run_that_goes_on_was_checked_when_it_began(tmp_path: Path) -> None:
    model = a_run(tmp_path / "run", "reasoning_rl") / "hf"
    assert faults("sft_800k", model) and not faults("sft_800k", model, resume=True)
    assert not faults(None, model)


def test_every_name_is_a_stage() -> None:
    assert set(STARTS_FROM) < set(options()["stage"])
