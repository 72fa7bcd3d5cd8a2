"""The order of R1's stages: what a stage starts from, where that is told (arXiv 2501.12948v2, Figure 2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from r1mega.config.faults import Fault
from r1mega.config.schema import Config

_RUN_FILE = "config.yaml"
# Stage -> the stage whose model it starts from; None: a base model, the model of no stage at all.
STARTS_FROM: dict[str, str | None] = {
    "r1_zero": None,
    "cold_start_sft": None,
    "reasoning_rl": "cold_start_sft",
    "rejection_sampling": "reasoning_rl",
    "sft_800k": None,  # from the base again, not from the model that the samples are of
    "all_scenario_rl": "sft_800k",
    "distill": None,
}


def stage_of(model: Path) -> str | None:
    """The stage of the run that wrote a model, RUN_DIR/hf or RUN_DIR/checkpoints/update-N; None where none is told."""
    for folder in list(model.absolute().parents)[:2]:
        path = folder / _RUN_FILE
        if not path.is_file():
            continue
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            name = found["stage"]["name"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            return None  # somebody else's file
        return name if isinstance(name, str) else None
    return None


def check_stage(config: Config) -> Iterator[Fault]:
    """A stage of the recipe does not start from the model of a stage that is not before it."""
    name = config.stage.name
    if name not in STARTS_FROM or not config.model.hf or config.run.resume or config.run.resume_from:
        return
    before, found = STARTS_FROM[name], stage_of(Path(config.model.hf))
    if found is None or found == before:
        return
    constraint = f"stage {name} starts from " + (f"the model of stage {before}" if before else "a base model")
    remedy = "name that model's directory, or set stage.name=null for a recipe of your own"
    yield Fault("model.hf", f"{config.model.hf}, of stage {found}", constraint, remedy)
