"""What is refused of the training of reward models, of those that RL asks, and of a judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from r1mega.config import io
from r1mega.config.check_reward_model import MODELS
from r1mega.config.faults import ConfigError
from r1mega.launch import late_checks, preflight
from r1mega.types import DOMAIN_OF, Prompt

CLASSIFIER = {"architectures": ["DeepseekV3ForSequenceClassification"], "id2label": {"0": "score"}}


@pytest.fixture
def faults(composed, inputs):
    """`faults(*overrides)` -> what is found before anything starts, without the checks that need whole files."""

    def find(*overrides: str) -> list[str]:
        given = [f"model.hf={inputs.model}", f"run.dir={inputs.run}", *overrides]
        if not any(override.startswith("data.train=") for override in overrides):
            given.append(f"data.train={inputs.qa}")
        try:
            preflight.require(io.typed(composed(*given)), late_checks=())
        except ConfigError as error:
            return [str(fault) for fault in error.faults]
        return []

    return find


def training(inputs, *overrides: str) -> list[str]:
    return ["stage=reward_model_helpful", "data=pairs", f"data.train={inputs.pairs}", *overrides]


def test_sound_input_passes(faults, inputs):
    assert faults(*training(inputs)) == []
    assert faults(*training(inputs, f"data.eval={inputs.pairs}", "data.eval_limit=1")) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=sft"], "data.format: got sft; stage.loop=reward_model reads pairs or labels"),
        (["model.mtp=train"], "model.mtp: got train; a reward model has no multi-token-prediction layer"),
        (
            ["reward_model.max_tokens_per_micro_batch=9000"],
            "reward_model.max_length: got 8192 for each of a pair; must fit "
            "reward_model.max_tokens_per_micro_batch=9000; lower it or raise "
            "reward_model.max_tokens_per_micro_batch to 16384",
        ),
        (["reward_model.batch_size=1", "parallel.dp=2"], "reward_model.batch_size: got 1; must be at least parallel"),
        (["reward_model.max_length=8193"], "reward_model.max_length: got 8193"),
    ],
)
def test_what_a_training_needs(faults, inputs, overrides, message):
    assert any(fault.startswith(message) for fault in faults(*training(inputs, *overrides)))


def test_its_rows_are_read(faults, inputs):
    (message,) = faults(*training(inputs, f"data.eval={inputs.labels}"))
    assert message.startswith(f"data.eval: {inputs.labels}:1: key 'chosen' is missing")


def test_a_reward_model_is_no_policy(faults, inputs):
    inputs.write_model(**CLASSIFIER)
    assert faults(*training(inputs)) == []
    (message,) = faults()
    assert message.startswith(f"model.hf: got {inputs.model}; is a reward model, which writes nothing")
    inputs.write_model(**CLASSIFIER | {"id2label": {"0": "a", "1": "b"}})
    assert "got a classifier of several labels" in faults(*training(inputs))[0]


def test_a_language_model_in_megatrons_format_gets_no_score(faults, inputs):
    (inputs.model / "model").mkdir()
    (inputs.model / "model" / ".metadata").write_text("")
    assert "holds a language model in Megatron's format" in faults(*training(inputs))[0]


def test_what_rl_asks_is_there_and_reads_the_same_tokens(faults, inputs, tmp_path):
    asks = ["reward.helpful=1"]
    assert faults(*asks) == [
        "reward.helpful_model: got nothing; reward.helpful=1 needs the checkpoint of a reward model; "
        "set reward.helpful_model=DIR, or reward.helpful=0"
    ]
    model = tmp_path / "rm"
    assert "must be a directory" in faults(*asks, f"reward.helpful_model={model}")[0]
    model.mkdir()
    asks.append(f"reward.helpful_model={model}")
    config = json.loads((inputs.model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    assert "must hold model.safetensors" in faults(*asks)[0]
    save_file({"model.norm.weight": np.ones(32, dtype=np.float32)}, model / "model.safetensors")
    assert "its config.json is not one of a reward model" in faults(*asks)[0]
    (model / "config.json").write_text(json.dumps(config | CLASSIFIER))
    assert faults(*asks) == []
    (model / "config.json").write_text(json.dumps(config | CLASSIFIER | {"vocab_size": 65}))
    assert "its vocab_size is 65, model.hf's 64" in faults(*asks)[0]
    (message,) = faults(f"reward.safety_model={model}")
    assert message.startswith(f"reward.safety_model: got {model}; reward.safety=0 leaves that model out")


def test_a_judge_has_an_address_and_a_name(faults):
    found = faults("reward.judge=1", "reward.judge_url=localhost:80", "reward.judge_domains=[]")
    assert [fault.partition(":")[0] for fault in found] == [
        "reward.judge_url", "reward.judge_model", "reward.judge_domains",
    ]  # fmt: skip
    assert faults("reward.judge=1", "reward.judge_url=http://localhost:80", "reward.judge_model=m") == []


def test_the_questions_that_models_judge_are_there(composed, inputs):
    def find(train: list[str], general: list[str], *overrides: str) -> list[str]:
        config = io.typed(composed(f"model.hf={inputs.model}", f"data.train={inputs.qa}", *overrides))
        asked = [[Prompt("0", "q", "a", domain=domain) for domain in domains] for domains in (train, general)]
        return late_checks._check_judged(*asked, config)

    assert find(["math"], []) == find(["math", "helpful"], [], "reward.helpful=1") == []
    assert find(["math"], ["helpful"], "reward.helpful=1", "reward.preference_from=3") == []
    (message,) = find(["math", "harmless"], [], "reward.helpful=1", "reward.safety=1")
    assert message.startswith("reward.helpful: got 1; no question of data.train or data.general has domain 'helpful'")
    (message,) = find(["math", "helpful"], ["helpful"], "reward.helpful=1", "reward.preference_from=3")
    assert message.startswith("data.train: got questions of domain helpful; before update reward.preference_from=3")
    assert set(DOMAIN_OF) == set(MODELS)
