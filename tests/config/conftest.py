"""Input that passes every check, made of files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.numpy import save_file

from r1mega.cli import register_schema
from r1mega.config import io
from r1mega.config.registry import conf_dir, options
from r1mega.config.schema import Config

MODEL = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip


class Inputs:
    """Paths of sound input under one folder; tests break what they need broken."""

    def __init__(self, place: Path) -> None:
        self.model = place / "hf"
        self.model.mkdir()
        self.write_model()
        (self.model / "tokenizer.json").write_text("{}")
        save_file({"model.norm.weight": np.ones(32, dtype=np.float32)}, self.model / "model.safetensors")
        self.qa = place / "qa.jsonl"
        self.qa.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?", "answer": 4}\n')
        self.sft = place / "sft.jsonl"
        self.sft.write_text('{"prompt": "1+1?", "response": "2"}\n')
        self.pairs = place / "pairs.jsonl"
        self.pairs.write_text('{"prompt": "1+1?", "chosen": "2", "rejected": "3"}\n')
        self.labels = place / "labels.jsonl"
        self.labels.write_text('{"prompt": "1+1?", "response": "2", "label": "safe"}\n')
        self.run = place / "run"

    def score(self) -> Path:
        """A reward model, for what asks one."""
        path = self.model.parent / "score"
        path.mkdir(exist_ok=True)
        fields = {**MODEL, "architectures": ["DeepseekV3ForSequenceClassification"], "id2label": {"0": "score"}}
        (path / "config.json").write_text(json.dumps(fields))
        save_file({"score.weight": np.ones((1, 32), dtype=np.float32)}, path / "model.safetensors")
        return path

    def write_model(self, **changes: object) -> None:
        values = {key: value for key, value in {**MODEL, **changes}.items() if value != "absent"}
        (self.model / "config.json").write_text(json.dumps(values))

    def overrides(self, train: Path | None = None) -> list[str]:
        return [f"model.hf={self.model}", f"data.train={train or self.qa}", f"run.dir={self.run}"]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


@pytest.fixture(scope="session")
def hydra_conf() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@pytest.fixture
def composed(hydra_conf: None):
    """`composed(*overrides)` -> what the command line would compose."""

    def run(*overrides: str) -> DictConfig:
        return compose("config", list(overrides))

    return run


@pytest.fixture(scope="session")
def experiment(hydra_conf: None) -> Callable[[str], Config]:
    """`experiment(name)` -> what it composes to, worked out once; not to be changed."""
    return cache(lambda name: io.typed(compose("config", [f"experiment={name}", "run.dir=runs/snapshot"])))


@pytest.fixture(scope="session")
def section(hydra_conf: None) -> Callable[[str, str], Any]:
    """`section(group, option)` -> the section that an option file gives; not to be changed.

    An option file speaks of its own section alone, so one composition takes an option of every group at once.
    """
    groups = {group: list(names) for group, names in options().items() if group != "experiment"}
    found = {}
    for names in zip_longest(*groups.values()):
        chosen = [(group, name) for group, name in zip(groups, names, strict=True) if name is not None]
        config = io.typed(compose("config", [*(f"{group}={name}" for group, name in chosen), "run.dir=runs/snapshot"]))
        found |= {(group, name): getattr(config, group) for group, name in chosen}
    return lambda group, name: found[group, name]
