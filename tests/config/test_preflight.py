"""Bad input is refused before any process starts, each fault with its place, what was found, rule and remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from r1mega.config import io
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import preflight


@pytest.fixture
def faults(composed: Callable[..., DictConfig], inputs) -> Callable[..., list[str]]:
    def find(*overrides: str) -> list[str]:
        try:
            preflight.require(io.typed(composed(*inputs.overrides(), *overrides)), late_checks=())
        except ConfigError as error:
            assert str(error).startswith("the run cannot start, ")
            return [str(fault) for fault in error.faults]
        return []

    return find


def test_sound_input_passes(faults: Callable[..., list[str]]) -> None:
    assert faults() == []
    assert faults("parallel=tp2_pp2_ep2") == []


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("parallel.tp=3", "parallel.tp: got 3; must divide the model's num_attention_heads = 4"),
        ("parallel.pp=3", "parallel.pp: got pp=3, vpp=1; pp x vpp must divide num_hidden_layers = 4"),
        ("parallel.ep=2", "parallel.ep: got ep=2, etp=1; ep x etp must divide tp x cp x dp = 1"),
    ],
)
def test_a_layout_that_does_not_divide(faults: Callable[..., list[str]], override: str, rule: str) -> None:
    assert any(text.startswith(rule) for text in faults(override)), faults(override)


def test_a_size_below_one_is_reported_once(faults: Callable[..., list[str]]) -> None:
    assert faults("parallel.tp=0") == ["parallel.tp: got 0; must be >= 1; set parallel.tp accordingly"]


def test_a_config_json_of_an_unknown_family(faults: Callable[..., list[str]], inputs) -> None:
    inputs.write_model(model_type="gpt2")
    (message,) = faults()
    assert message.startswith(f"model.hf: {inputs.model / 'config.json'}: model_type: got 'gpt2'; must be one of")


def test_a_field_that_would_be_ignored_is_refused_by_name(faults: Callable[..., list[str]], inputs) -> None:
    inputs.write_model(clip_qkv=5, kv_lora_rank="absent")
    found = faults()
    assert any("kv_lora_rank: missing" in text for text in found)
    assert any("clip_qkv: got 5" in text for text in found)


@pytest.mark.parametrize("text", [None, "", "[]", '"text"', "{"])
def test_a_config_json_that_is_none(faults: Callable[..., list[str]], inputs, text: str | None) -> None:
    path = inputs.model / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    (message,) = faults()
    assert message.startswith(f"model.hf: got {path}: ")


def test_a_truncated_checkpoint(faults: Callable[..., list[str]], inputs) -> None:
    path = inputs.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (message,) = faults()
    assert f"{path}: truncated" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "qa.jsonl: the file is empty"),
        ('{"question": "a", "answer": "b"}\n{"question": \n', "qa.jsonl:2: "),
        ('{"question": "a", "answer": "b"}\n\n[1]\n', "qa.jsonl:3: "),
        ('{"question": "a"}\n', "qa.jsonl:1: "),
    ],
)
def test_malformed_rows_are_named_by_line(faults: Callable[..., list[str]], inputs, text: str, place: str) -> None:
    inputs.qa.write_text(text)
    (message,) = faults()
    assert message.startswith("data.train: ")
    assert place in message
    assert message.endswith("; correct the file or data.train, or set data.question_key, data.answer_key")


def test_questions_of_every_domain_pass(faults: Callable[..., list[str]], inputs) -> None:
    """Several right answers, a number, options, tests in place of an answer; a program without its tests does not."""
    rows = [
        {"question": "a", "answer": ["1/2", "0.5"]},
        {"question": "b", "answer": 3},
        {"question": "c", "answer": "B", "domain": "choice", "options": ["w", "x", "y", "z"]},
        {"question": "d", "domain": "code", "tests": [{"input": "1", "output": "2"}]},
    ]
    inputs.qa.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert faults() == []
    inputs.qa.write_text(json.dumps({"question": "d", "domain": "code"}) + "\n")
    (message,) = faults()
    assert "qa.jsonl:1: 'tests' must be a list" in message


def test_a_held_out_file_is_read_too(faults: Callable[..., list[str]], inputs) -> None:
    (message,) = faults(f"data.eval={inputs.sft}")
    assert message.startswith(f"data.eval: {inputs.sft}:1: ")
    assert faults(f"data.eval={inputs.sft}", "data.question_key=prompt", "data.answer_key=response")[0].startswith(
        f"data.train: {inputs.qa}:1: "
    )


def test_responses_longer_than_the_model_reads(faults: Callable[..., list[str]]) -> None:
    assert faults("rollout.max_tokens=9000") == [
        "rollout.max_tokens: got 9000; must be at most max_position_embeddings=8192; "
        "lower it or use a model for longer texts"
    ]


def test_a_dense_model_has_no_experts_to_replay(faults: Callable[..., list[str]], inputs) -> None:
    overrides = ("rollout=sglang", f"sglang.python={sys.executable}", "rollout.router_replay=true")
    assert faults(*overrides) == []
    path = inputs.model / "config.json"
    config = json.loads(path.read_text()) | {"first_k_dense_replace": 4}
    path.write_text(json.dumps(config))
    assert faults(*overrides) == [
        "rollout.router_replay: got true; a deepseek_v3 model of these layers has no experts to replay the choice of; "
        "set it to false"
    ]


def test_everything_wrong_is_reported_at_once(faults: Callable[..., list[str]], inputs) -> None:
    inputs.qa.write_text("")
    (inputs.model / "model.safetensors").unlink()
    inputs.run.mkdir()
    (inputs.run / "config.yaml").write_text("")
    found = faults("parallel.tp=3", "algo.updates_per_round=7", "rollout=sglang", "sglang.python=none")
    places = [text.partition(":")[0] for text in found]
    for place in ("run.dir", "model.hf", "sglang.python", "algo.updates_per_round", "parallel.tp", "data.train"):
        assert place in places


def test_late_checks_run_on_sound_input_only(composed: Callable[..., DictConfig], inputs) -> None:
    seen: list[Config] = []

    def late(config: Config) -> list[Fault]:
        seen.append(config)
        return [Fault("data.train", "a long prompt", "must be short", "shorten it")]

    def raising(config: Config) -> list[Fault]:
        raise ValueError("cannot tokenize")

    sound = io.typed(composed(*inputs.overrides()))
    with pytest.raises(ConfigError) as caught:
        preflight.require(sound, late_checks=(late, raising))
    assert [str(fault) for fault in caught.value.faults] == [
        "data.train: got a long prompt; must be short; shorten it", "cannot tokenize",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        preflight.require(io.typed(composed(*inputs.overrides(), "parallel.tp=3")), late_checks=(late,))
    assert len(seen) == 1
    assert "a long prompt" not in str(caught.value)
