from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega.rollout.engine_config import write_engine_config


def written(source: Path, out: Path) -> dict:
    write_engine_config(source, out)
    return json.loads((out / "config.json").read_text("utf-8"))


def test_deepseek_gets_what_transformers_does_not_save(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3")
    saved = json.loads((source / "config.json").read_text("utf-8"))
    added = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1}
    assert not added.keys() & saved.keys()
    assert written(source, tmp_path / "out") == saved | added


def test_what_the_checkpoint_says_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "deepseek_v3", "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2}
    files = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config | files), "utf-8")
    assert written(source, tmp_path / "out") == config | {"ep_size": 1}


def test_fp8_blocks_are_said_as_deepseek_says_them(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3")
    write_engine_config(source, tmp_path / "out", fp8=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_other_families_are_left_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    assert written(source, tmp_path / "out") == json.loads((source / "config.json").read_text("utf-8"))


def test_the_tokenizer_comes_along_and_the_weights_do_not(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    out = tmp_path / "out"
    write_engine_config(source, out)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any("safetensors" in name for name in names)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_tokenizer_from_elsewhere(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, other = checkpoint("llama"), tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    write_engine_config(source, tmp_path / "out", tokenizer=other)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_what_is_no_model_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match="not the config.json of a model"):
        write_engine_config(tmp_path, tmp_path / "out")
