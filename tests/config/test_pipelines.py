"""Every file of conf/pipeline: its stages compose and pass the checks; R1 at full scale becomes a chain of jobs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hydra import compose

from r1mega.config import io
from r1mega.config.check_pipeline import order, stage_before
from r1mega.config.check_stage import STARTS_FROM
from r1mega.config.choices import Loop, Scheduler, StageRun
from r1mega.config.registry import options
from r1mega.config.schema import Config
from r1mega.pipeline import chain, faults
from r1mega.pipeline.run import Asked
from r1mega.pipeline.stage import Place, Stage, stages_of

PIPELINES = list(options()["pipeline"])


@pytest.fixture(scope="module")
def stages(hydra_conf: None) -> Callable[[str], tuple[Config, dict[str, Stage]]]:
    """`stages(name)` -> the pipeline's configuration and its stages, each composed once."""
    one = cache(lambda overrides: io.typed(compose("config", list(overrides))))

    def once(overrides: Sequence[str]) -> Config:
        return one(tuple(overrides))

    def made(name: str) -> tuple[Config, dict[str, Stage]]:
        config = once([f"pipeline={name}", "run.dir=runs/pipeline"])
        place = Place(Path("runs/pipeline").absolute(), 0)
        return config, stages_of(config.pipeline, order(config.pipeline), place, once)

    return cache(made)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_composes_and_passes_the_checks(stages, name: str) -> None:
    assert faults.find(stages(name)[1]) == []


def test_r1_has_every_stage_of_the_recipe_from_the_model_that_it_starts_from(stages) -> None:
    _, found = stages("r1_671b")
    configs = {name: stage.config() for name, stage in found.items() if stage.spec.run is not StageRun.tool}
    named = {name: config.stage.name for name, config in configs.items()}
    assert set(STARTS_FROM) <= set(named.values())
    for name, recipe_stage in named.items():
        if recipe_stage in STARTS_FROM and recipe_stage is not None:
            origin = stage_before(found[name].origins["model.hf"])
            assert (named[origin] if origin else None) == STARTS_FROM[recipe_stage], name
    students = {stage.spec.experiment for stage in found.values() if str(stage.spec.experiment).startswith("distill_")}
    assert students == {name for name in options()["experiment"] if name.startswith("distill_")}
    trained = {name for name, config in configs.items() if config.stage.loop in (Loop.rl, Loop.sft)}
    evaluated = {stage_before(found[name].origins["model.hf"]) for name in named if named[name] == "evaluate"}
    assert trained == evaluated - {None}, "an evaluation after each"
    assert all(config.cluster.scheduler is Scheduler.slurm for config in configs.values())


def test_r1_becomes_a_chain_of_jobs(stages, capsys, tmp_path: Path) -> None:
    config, found = stages("r1_671b")
    asked = Asked([], compose=next(iter(found.values())).compose, arguments=["pipeline=r1_671b"], dry_run=True)
    assert chain.run(config, found, asked) == 0
    script = capsys.readouterr().out
    path = tmp_path / "chain.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], timeout=30).returncode == 0
    jobs = dict(re.findall(r"^job_(\w+)=\$\(sbatch --parsable (.*)<<", script, re.MULTILINE))
    assert list(jobs) == list(found)
    for name, words in jobs.items():
        waits = "".join(f":${{job_{before}}}" for before in found[name].before)
        assert words == (f"--dependency=afterok{waits} --kill-on-invalid-dep=yes " if waits else ""), name
    assert script.count("#SBATCH --nodes=64\n") == 5  # R1-Zero, two stages of RL, two of sampling
    assert "pipeline=r1_671b pipeline.only=all_scenario_rl" in script
    assert not Path(config.run.dir).exists()


def test_a_place_of_a_path_is_not_left_over(stages) -> None:
    _, found = stages("r1_671b")
    stage = found["all_scenario_rl"]
    text = io.to_yaml(stage.config())
    assert "pipeline-" not in text
    assert f"hf: {found['sft_800k'].output('model')}" in text
    assert "pipeline-input/model.hf/" in io.to_yaml(stage.general_config)


def test_other_commands_refuse_a_pipeline(capsys) -> None:
    from r1mega import cli

    assert cli.main(["train", "pipeline=r1_671b"]) == 2
    assert "r1mega pipeline alone reads it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "field", "given"),
    [("reasoning_rl", "data.eval", "held_out.jsonl"), ("rejection_sampling", "curate.benchmarks", "[aime.jsonl]")],
)
def test_a_file_that_is_no_input_is_told(stages, name: str, field: str, given: str) -> None:
    _, found = stages("r1_671b")
    stage = found[name]
    stage = Stage(name, stage.spec, stage.place, [f"{field}={given}"], stage.paths, stage.compose)
    (fault,) = faults.find({name: stage})
    assert fault.startswith(f"stage {name}: {field}: got ") and "is a file that the stage reads" in fault


def test_files_of_a_list_are_inputs_by_name(stages) -> None:
    _, found = stages("r1_671b")
    stage, path = found["rejection_sampling"], found["rejection_sampling"].place.root / "aime.jsonl"
    spec = replace(stage.spec, inputs={**stage.spec.inputs, "aime": "aime2024"})
    spec.overrides = [*spec.overrides, "curate.benchmarks=[{aime}]"]
    stage = Stage(stage.name, spec, stage.place, stage.shared, {**stage.paths, "aime": path}, stage.compose)
    assert faults.find({stage.name: stage}) == []
    assert stage.config().curate.benchmarks == [str(path)]
