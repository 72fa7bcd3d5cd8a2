"""What an evaluation refuses before a process starts, each with what would mend it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1mega.benchmark import rows
from r1mega.config import choices, schema
from r1mega.config.check import check
from r1mega.config.decisive import decisive
from r1mega.config.faults import ConfigError
from r1mega.config.schema import BenchmarkConfig, Config
from r1mega.launch import evaluation
from r1mega.loop import wire_evaluate


@pytest.fixture
def config(checkpoint, tmp_path: Path) -> Config:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n" + json.dumps({"question": "?", "answer": 1}))
    benchmark = BenchmarkConfig(
        name="file", data=str(data), template=choices.Template.plain, max_tokens=32, max_prompt_tokens=64
    )
    return Config(
        run=schema.RunConfig(dir=str(tmp_path / "run")),
        stage=schema.StageConfig(loop=choices.Loop.evaluate),
        model=schema.ModelConfig(hf=str(checkpoint("qwen2")), init=choices.Init.load),
        precision=schema.PrecisionConfig(params=choices.ParamDtype.fp32),
        device=schema.DeviceConfig(type=choices.DeviceType.cpu),
        data=schema.DataConfig(train="", format=choices.DataFormat.qa),
        rollout=schema.RolloutConfig(engine=choices.EngineKind.embedded, engines=3),
        benchmark=benchmark,
    )


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        evaluation.prepare(config)
    assert not Path(config.run.dir).exists()
    return str(error.value)


def test_it_is_prepared_and_gone_on_with_and_other_content_is_refused(config: Config) -> None:
    assert check(config) == []
    path = evaluation.prepare(config)
    directory = Path(config.run.dir)
    assert path == directory / "config.yaml"
    problems = rows.read_problems(directory / "benchmark.jsonl")
    assert [(problem.prompt, problem.answer) for problem in problems] == [("2+2?", "4"), ("?", "1")]
    with pytest.raises(ConfigError, match="already holds a run"):
        evaluation.prepare(config)
    config.run.resume = True
    assert evaluation.prepare(config) == directory / "config.resumed-1.yaml"
    config.benchmark.temperature = 0.7
    with pytest.raises(ConfigError, match=r"benchmark.temperature: got 0.7; the run was started with 0.6"):
        evaluation.prepare(config)
    config.benchmark.temperature = 0.6
    Path(config.benchmark.data).write_text('{"question": "2+2?", "answer": "5"}\n')
    with pytest.raises(ConfigError, match=r"benchmark.data: .* the samples kept in .* are of other problems"):
        evaluation.prepare(config)


def test_what_has_no_grader_here_says_what_to_run(config: Config) -> None:
    config.benchmark.grader = choices.GraderName.judge
    config.benchmark.judge, config.benchmark.harness = "GPT-4-Turbo-1106", "alpaca_eval --model_outputs X"
    assert "benchmark.grader: got judge; file is graded by GPT-4-Turbo-1106; keep the responses with " in refused(
        config
    )
    assert "benchmark.grader=none, then run: alpaca_eval --model_outputs X" in refused(config)
    config.benchmark.grader = choices.GraderName.harness
    assert "run it there: alpaca_eval" in refused(config)
    config.benchmark.grader = choices.GraderName.none
    config.benchmark.readability = True
    assert "benchmark.readability: got true; is reported beside grades" in refused(config)
    config.benchmark.readability = False
    evaluation.prepare(config)


def test_code_is_refused_where_nothing_runs_tests(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r1mega.reward import sandbox

    def absent(_kind: str) -> None:
        raise sandbox.SandboxError("reward.sandbox: got bubblewrap; bwrap is not here")

    config.benchmark.grader, config.benchmark.data = choices.GraderName.code, str(tmp_path / "code.jsonl")
    (tmp_path / "code.jsonl").write_text('{"question": "echo", "tests": [{"input": "1", "output": "1"}]}\n')
    monkeypatch.setattr(sandbox, "open_sandbox", absent)
    assert "bwrap is not here" in refused(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "benchmark: got nothing; must say what is asked; choose an option: benchmark=aime2024"),
        ({"data": "no.jsonl"}, "benchmark.data: got no.jsonl; must be a JSONL file of the benchmark's problems"),
        ({"data": None}, "file has no set on the hub; set benchmark.data=FILE.jsonl"),
        ({"pass_at": [0, 1]}, "benchmark.pass_at: got [0, 1]; every k must be at least 1"),
        ({"standings": "no.jsonl"}, "benchmark.standings: got no.jsonl; must be a JSONL file of contests"),
        ({"max_tokens": 10**6}, "benchmark.max_tokens: got 1000000; must be at most max_position_embeddings="),
        ({"max_prompt_tokens": 2}, "the limit is 2; raise benchmark.max_prompt_tokens"),
        ({"template": choices.Template.chat}, "has no chat template"),
        ({"grader": choices.GraderName.choice}, "between 2 and 10 options are expected"),
        ({"prompt": "{passage}"}, "the prompt asks for 'passage'"),
    ],
)
def test_faults(config: Config, values: dict, message: str) -> None:
    for name, value in values.items():
        setattr(config.benchmark, name, value)
    assert message in refused(config)


def test_a_hub_without_the_package_or_the_net_is_one_clear_message(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.benchmark.data, config.benchmark.hub = None, "HuggingFaceH4/aime_2024"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"benchmark.data: got nothing; HuggingFaceH4/aime_2024 cannot be had from the"
    ):
        wire_evaluate.problems_of(config)
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = [str(fault) for fault in check(config)]
    assert found == [
        "benchmark.data: got nothing; file comes from HuggingFaceH4/aime_2024 on the Hugging Face hub, and datasets is "
        "not installed; install it (pip install datasets), or set benchmark.data=FILE.jsonl"
    ]


def test_only_what_changes_samples_is_decisive(config: Config) -> None:
    before = decisive(config)
    config.benchmark.data, config.benchmark.plot, config.rollout.max_batch, config.algo.updates = "x", False, 1, 7
    assert decisive(config) == before
    for section, name, value in (("benchmark", "top_p", 0.5), ("run", "seed", 9), ("model", "hf", "x")):
        setattr(getattr(config, section), name, value)
        assert decisive(config) != before
        before = decisive(config)


def test_a_fingerprint_tells_weights_apart(checkpoint, tmp_path: Path) -> None:
    first = checkpoint("qwen2")
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "model.safetensors"
    copy.write_bytes((first / "model.safetensors").read_bytes())
    assert wire_evaluate.fingerprint(first) == wire_evaluate.fingerprint(tmp_path / "copy")
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert wire_evaluate.fingerprint(first) != wire_evaluate.fingerprint(tmp_path / "copy")
