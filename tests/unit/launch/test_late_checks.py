"""Checks of whole files against the model: tensors, tokens, positions."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from r1mega.config import choices, schema
from r1mega.launch.late_checks import check_sglang, check_tensors, check_tokens
from r1mega.reward.sandbox import open_sandbox


@pytest.fixture
def config(checkpoint, tmp_path):
    def make(source, rows=({"question": "1+1?", "answer": "2"},), **positions):
        config = schema.Config()
        config.stage.loop, config.model.init = choices.Loop.rl, choices.Init.load
        config.data.format = choices.DataFormat.qa
        config.model.hf, config.data.train = str(source), str(tmp_path / "train.jsonl")
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.rollout.max_tokens = 64
        config.data.max_prompt_tokens = 2000
        return config

    return make


def altered(source, target, change):
    """A copy of a checkpoint whose tensors `change` has edited."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_sound_checkpoint_passes(checkpoint, config):
    for family in ("deepseek_v3", "qwen2", "llama"):
        assert check_tensors(config(checkpoint(family))) == []
        assert check_tokens(config(checkpoint(family))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            "lacks tensor model.layers.1.self_attn.k_proj.weight",
        ),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}), "got shape [63]"),
        (lambda t: t.update({"model.norm.bias": t["model.norm.weight"].clone()}), "holds tensor model.norm.bias"),
        (lambda t: t.update({"model.layers.4.enorm.weight": t["model.norm.weight"].clone()}), "a llama model has none"),
    ],
)
def test_tensors_that_do_not_fit(checkpoint, config, tmp_path, change, words):
    source = altered(checkpoint("llama"), tmp_path / "model", change)
    (fault,) = check_tensors(config(source))
    assert words in fault


def test_a_prompt_over_the_limit_is_named_by_its_line(checkpoint, config):
    made = config(
        checkpoint("llama"), rows=[{"question": "1+1?", "answer": "2"}, {"question": "x" * 3000, "answer": "2"}]
    )
    with pytest.raises(ValueError, match=r"train\.jsonl:2: the prompt has \d+ tokens"):
        check_tokens(made)


def test_supervised_rows_are_indexed_and_a_long_one_leaves_no_run(checkpoint, config, tmp_path):
    made = config(checkpoint("llama"), rows=[{"prompt": "1+1?", "response": "2"}])
    made.stage.loop, made.data.format = choices.Loop.sft, choices.DataFormat.sft
    made.run.dir = str(tmp_path / "run")
    assert check_tokens(made) == []
    assert len(list((tmp_path / "run" / "index").iterdir())) == 2
    made.run.dir, made.sft.max_length = str(tmp_path / "other"), 9
    (fault,) = check_tokens(made)
    assert "train.jsonl:1: prompt and response have " in fault and "the limit is 9; raise sft.max_length" in fault
    assert not (tmp_path / "other").exists()
    made.sft.index_dir = str(tmp_path / "train.jsonl" / "no_directory")
    (fault,) = check_tokens(made)
    assert fault.startswith("sft.index_dir: got ")


def test_prompt_and_response_need_positions(checkpoint, config):
    made = config(checkpoint("llama"))
    made.rollout.max_tokens = 1900
    (fault,) = check_tokens(made)
    assert "max_position_embeddings is 2048" in fault
    assert "train.jsonl:1" in fault


def test_a_tokenizer_of_another_model(checkpoint, config):
    (fault, *_) = check_tokens(
        config(checkpoint("llama", vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    )
    assert "the model's vocab_size is 64" in fault


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.5.21", None),
        ("0.4.0", "has SGLang 0.4.0; must have 0.5.21"),
        (None, "has SGLang none; must have 0.5.21"),
    ],
)
def test_the_version_of_sglang(checkpoint, config, tmp_path, version, words):
    """A Python that says which version it has, or knows of none."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    asked = config(checkpoint("llama"))
    asked.sglang.python = str(python)
    assert check_sglang(asked) == []  # the embedded engine needs none
    asked.rollout.engine = choices.EngineKind.sglang
    found = check_sglang(asked)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("0.5.21", "0.3.2"), None),
        (("0.5.21", "0.2.0"), "has sglang-router 0.2.0; must have 0.3.2"),
        (("0.5.21",), "has sglang-router none; must have 0.3.2"),
        ((), "has SGLang none; must have 0.5.21"),
    ],
)
def test_the_version_of_the_router(checkpoint, config, tmp_path, lines, words):
    """As Python answers: a line for each package, up to the first that is not there."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines) + f"exit {int(len(lines) < 2)}\n")
    python.chmod(0o755)
    asked = config(checkpoint("llama"))
    asked.rollout.engine, asked.sglang.python = choices.EngineKind.sglang, str(python)
    asked.sglang.router = True
    found = check_sglang(asked)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    ("theirs", "words"),
    [("2.13.1+cu130", None), ("2.13.0", None), ("2.12.0", "has torch 2.12.0; must have 2.13"), ("", "has torch none")],
)
def test_handles_of_memory_need_one_release_of_torch(checkpoint, config, tmp_path, monkeypatch, theirs, words):
    monkeypatch.setattr("r1mega.launch.late_checks.version", lambda package: "2.13.0+cpu")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 0.5.21\necho {theirs}\n")
    python.chmod(0o755)
    asked = config(checkpoint("llama"))
    asked.rollout.engine, asked.sglang.python = choices.EngineKind.sglang, str(python)
    assert check_sglang(asked) == []  # files are read by any
    asked.sglang.transport = choices.Transport.ipc
    found = check_sglang(asked)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_a_python_that_cannot_be_run(checkpoint, config, tmp_path):
    asked = config(checkpoint("llama"))
    asked.rollout.engine, asked.sglang.python = choices.EngineKind.sglang, str(tmp_path)
    (found,) = check_sglang(asked)
    assert "cannot be run" in found and found.startswith("sglang.python: got ")


def test_programs_need_a_sandbox_that_works(checkpoint, config, monkeypatch):
    row = {"question": "1+1?", "domain": "code", "tests": [{"input": "", "output": "2"}]}
    asked = config(checkpoint("llama"), rows=[row])
    monkeypatch.setenv("PATH", "")
    open_sandbox.cache_clear()
    try:
        (fault,) = check_tokens(asked)
        assert check_tokens(config(checkpoint("llama"))) == []  # nothing to run, nothing needed
    finally:
        open_sandbox.cache_clear()
    assert fault.startswith("reward.sandbox: got bubblewrap; `bwrap` must be on PATH; install it")
