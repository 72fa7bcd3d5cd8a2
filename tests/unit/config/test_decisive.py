"""What makes two runs the same run."""

from __future__ import annotations

import pytest

from r1mega.config.choices import DataFormat, EngineKind, Init, Loop, Packing, ParamDtype, Schedule
from r1mega.config.decisive import decisive, digest
from r1mega.config.schema import Config


@pytest.fixture
def config() -> Config:
    made = Config()
    made.run.dir, made.model.hf, made.data.train = "runs/a", "model", "train.jsonl"
    made.stage.loop, made.model.init, made.precision.params = Loop.rl, Init.load, ParamDtype.fp32
    made.data.format, made.rollout.engine = DataFormat.qa, EngineKind.embedded
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.dir", "runs/b"),
        ("parallel.tp", 2),
        ("checkpoint.every", 7),
        ("logger.wandb", True),
        ("evaluate.every", 3),
        ("memory.offload", True),
        ("algo.max_tokens_per_micro_batch", 5),
        ("algo.updates", 7),
        ("sft.updates", 7),
        ("sft.index_dir", "elsewhere"),
        ("sft.max_tokens_per_micro_batch", 5),
        ("stage.name", "r1_zero"),
        ("model.card", "qwen2_5_32b"),
    ],
)
def test_what_may_change(config: Config, path: str, value: object) -> None:
    before = digest(config)
    section, name = path.split(".")
    setattr(getattr(config, section), name, value)
    assert digest(config) == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.seed", 1),
        ("model.hf", "other"),
        ("data.train", "other.jsonl"),
        ("rollout.temperature", 0.5),
        ("rollout.stop", ["x"]),
        ("rollout.max_tokens_from", [[8, 2048]]),
        ("data.general", "general.jsonl"),
        ("data.general_share", 0.25),
        ("reward.preference_from", 8),
        ("algo.kl_coef", 0.5),
        ("optim.lr", 1.0),
        ("reward.format", 0.0),
        ("precision.params", ParamDtype.bf16),
    ],
)
def test_what_may_not(config: Config, path: str, value: object) -> None:
    before, old = digest(config), decisive(config)
    section, name = path.split(".")
    setattr(getattr(config, section), name, value)
    assert digest(config) != before
    assert [key for key, now in decisive(config).items() if old[key] != now] == [path]


def test_the_size_of_a_chunk_decides_what_an_update_is(config: Config) -> None:
    config.sft.packing = Packing.window
    before, old = digest(config), decisive(config)
    config.sft.max_tokens_per_micro_batch += 1
    assert digest(config) != before
    assert [key for key, now in decisive(config).items() if old[key] != now] == ["sft.max_tokens_per_micro_batch"]


def test_a_learning_rate_that_depends_on_the_length_fixes_it(config: Config) -> None:
    config.optim.schedule = Schedule.cosine
    before = digest(config)
    config.algo.updates += 1
    assert digest(config) != before
    config.algo.updates -= 1
    config.sft.updates += 1
    assert digest(config) == before, "the other loop's length has no part in it"
