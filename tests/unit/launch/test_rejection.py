"""What a rejection sampling refuses before a process starts, each with what would mend it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config import choices, schema
from r1mega.config.check import check
from r1mega.config.check_slurm import check_submit
from r1mega.config.decisive import decisive
from r1mega.config.faults import ConfigError
from r1mega.config.schema import Config
from r1mega.config.schema_curate import CurateConfig
from r1mega.curation.questions import load_questions
from r1mega.launch import rejection


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(checkpoint, tmp_path: Path) -> Config:
    data = write(
        tmp_path / "rows.jsonl", {"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": ["6", "six"]}
    )
    return Config(
        run=schema.RunConfig(dir=str(tmp_path / "run")),
        stage=schema.StageConfig(loop=choices.Loop.reject),
        model=schema.ModelConfig(hf=str(checkpoint("qwen2")), init=choices.Init.load),
        precision=schema.PrecisionConfig(params=choices.ParamDtype.fp32),
        device=schema.DeviceConfig(type=choices.DeviceType.cpu),
        data=schema.DataConfig(
            train=data, format=choices.DataFormat.qa, template=choices.Template.plain, max_prompt_tokens=64
        ),
        rollout=schema.RolloutConfig(engine=choices.EngineKind.embedded, engines=3, max_tokens=32),
        curate=CurateConfig(samples=2),
    )


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        rejection.prepare(config)
    return str(error.value)


def test_it_is_prepared_and_gone_on_with(config: Config, tmp_path: Path) -> None:
    assert check(config) == []
    directory = Path(config.run.dir)
    assert rejection.prepare(config) == directory / "config.yaml"
    assert [one.prompt.other_answers for one in load_questions(directory / "questions.jsonl")] == [(), ("six",)]
    assert "already holds a run" in refused(config)
    config.run.resume = True
    (directory / "curated.jsonl").write_text("of other filters")
    config.curate.per_prompt, config.curate.benchmarks = 1, [write(tmp_path / "b.jsonl", {"question": "2 + 2"})]
    assert rejection.prepare(config) == directory / "config.resumed-1.yaml"
    assert not (directory / "curated.jsonl").exists()
    assert [one.left_out for one in load_questions(directory / "questions.jsonl")] == ["contaminated", ""]
    config.rollout.top_p = 0.9
    assert "rollout.top_p: got 0.9; the run was started with 1.0" in refused(config)
    config.rollout.top_p, config.curate.prompt = 1.0, "Say: {question}"
    assert "data.train: got" in (found := refused(config)) and "are of other questions" in found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domain": "general"}, "curate.unjudged: got false; 2 questions"),
        ({"prompt": "{question}{response}"}, "rows.jsonl:1: the prompt asks for 'response'"),
        ({"prompt": "{question}" + 70 * "x"}, "the limit is 64; raise data.max_prompt_tokens"),
        ({"opening": 70 * "x"}, "the limit is 64"),
    ],
)
def test_faults(config: Config, values: dict, message: str) -> None:
    for name, value in values.items():
        setattr(config.curate, name, value)
    assert message in refused(config) and not Path(config.run.dir).exists()


def test_everything_left_out_leaves_nothing_to_ask(config: Config, tmp_path: Path) -> None:
    rows = [{"question": "2+2"}, {"question": "3+3"}]
    config.curate.benchmarks = [write(tmp_path / "b.jsonl", *rows)]
    assert "no question of it is asked: all are contaminated" in refused(config)


def test_only_what_changes_samples_is_decisive(config: Config) -> None:
    before = decisive(config)
    config.curate.per_prompt, config.curate.form, config.rollout.max_batch = 3, choices.ResponseForm.any, 1
    config.algo.updates, config.data.train = 7, "x"
    assert decisive(config) == before
    for section, name, value in (("curate", "samples", 9), ("rollout", "temperature", 0.5), ("reward", "judge", 1.0)):
        setattr(getattr(config, section), name, value)
        assert decisive(config) != before
        before = decisive(config)


def test_a_job_is_not_made_of_it(config: Config) -> None:
    config.cluster.scheduler = choices.Scheduler.slurm
    assert any("stage.loop: got reject" in str(fault) for fault in check_submit(config))
