"""Bytes that a run will write, against numbers worked by hand, and the fault where there is no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config.choices import EngineDtype, EngineKind, Loop, ParamDtype, Transport
from r1mega.config.schema import Config
from r1mega.launch.check_disk import check_disk, free_bytes, written
from r1mega.models import cards, hf_fields

COUNT = 1_777_088_000  # parameters of the smallest student


@pytest.fixture
def fields() -> hf_fields.HfFields:
    return hf_fields.read(cards.folder("r1_distill_qwen_1_5b"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config()
    made.stage.loop, made.precision.params = Loop.sft, ParamDtype.bf16
    made.rollout.engine, made.run.dir = EngineKind.embedded, str(tmp_path / "not" / "there" / "yet")
    return made


def kinds(config: Config, fields: hf_fields.HfFields) -> dict[str, tuple[int, float]]:
    """What is written -> how many at once, and bytes a parameter."""
    return {kind.what: (kind.count, kind.nbytes / COUNT) for kind in written(config, fields)}


def test_exports(config: Config, fields) -> None:
    assert kinds(config, fields) == {"exports": (1, 2)}
    config.export.every, config.sft.updates = 30, 100
    assert kinds(config, fields) == {"exports": (4, 2)}
    config.export.hf = False
    assert kinds(config, fields) == {"exports": (3, 2)}
    config.stage.loop = Loop.evaluate
    assert kinds(config, fields) == {}


def test_checkpoints(config: Config, fields) -> None:
    config.export.hf, config.checkpoint.every, config.checkpoint.keep_best = False, 10, 1
    # bf16 weights, fp32 masters, fp32 moments; two newest, the best, and one that is being written.
    assert kinds(config, fields) == {"checkpoints": (4, 2 + 4 + 8)}
    config.precision.moments = ParamDtype.bf16
    assert kinds(config, fields) == {"checkpoints": (4, 2 + 4 + 4)}
    config.stage.loop = Loop.rl  # which keeps its reference besides
    assert kinds(config, fields) == {"checkpoints": (4, 2 + 2 + 4 + 4)}
    config.run.resume = True  # the others are there already
    assert kinds(config, fields) == {"checkpoints": (1, 12)}


def test_published_weights(config: Config, fields) -> None:
    config.export.hf, config.stage.loop, config.rollout.engine = False, Loop.rl, EngineKind.sglang
    assert kinds(config, fields) == {"published weights": (2, 2)}
    config.sglang.dtype = EngineDtype.fp8
    assert kinds(config, fields) == {"published weights": (2, 1)}
    config.sglang.transport = Transport.ipc
    assert kinds(config, fields) == {}
    config.sglang.recovery_copy = True
    assert kinds(config, fields) == {"published weights": (2, 1)}


def test_the_fault_has_figures_and_the_disk_is_found_before_the_directory_is_there(config: Config, fields) -> None:
    needed = 2 * COUNT
    assert list(check_disk(config, fields, lambda _place: needed)) == []
    (fault,) = check_disk(config, fields, lambda _place: needed - 1)
    assert str(fault) == (
        f"run.dir: got 3.6 GB free at {config.run.dir}; needs about 3.6 GB: 1 exports of 3.6 GB; choose a place with "
        "more room, or raise export.every or set export.hf=false"
    )
    assert free_bytes(Path(config.run.dir)) > 0


def test_each_file_system_is_looked_at_for_itself(config: Config, fields) -> None:
    config.stage.loop, config.rollout.engine, config.sglang.weights_dir = Loop.rl, EngineKind.sglang, "/proc/elsewhere"
    found = {fault.field for fault in check_disk(config, fields, lambda _place: 0)}
    assert found == {"run.dir", "sglang.weights_dir"}
