from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config import io
from r1mega.config.choices import DeviceType
from r1mega.config.schema import Config, DeviceConfig, ParallelConfig, RunConfig
from r1mega.launch import local, preflight

WORKER = """
import argparse, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True)
path = parser.parse_args().config
from r1mega.parallel import fork
fork.divide()
names = ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE")
print(path, *(os.environ.get(name) for name in names), flush=True)
if os.environ["RANK"] == os.environ.get("FAIL_RANK"):
    sys.exit("no luck")
"""


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local, "WORKER", "fake_worker")
    monkeypatch.setattr(preflight, "require", lambda config: None)


def config_at(path: Path) -> Config:
    device = DeviceConfig(type=DeviceType.cpu, threads=3)
    return Config(run=RunConfig(dir=str(path)), parallel=ParallelConfig(tp=2, pp=1, dp=2), device=device)


@pytest.mark.usefixtures("fake_worker")
def test_one_worker_for_each_rank_finds_the_resolved_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert local.run(config_at(tmp_path / "run")) == 0
    path = tmp_path / "run" / "config.yaml"
    expected = f"{path} 4 127.0.0.1 3 1\n"
    assert capfd.readouterr().out == expected
    assert [(tmp_path / "run" / "logs" / f"rank{rank}.log").read_text() for rank in (1, 2, 3)] == [expected] * 3
    assert "tp: 2" in path.read_text()
    assert path.read_text() == io.to_yaml(config_at(tmp_path / "run"))


@pytest.mark.usefixtures("fake_worker")
def test_a_failed_rank_gives_the_exit_code_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL_RANK", "2")
    assert local.run(config_at(tmp_path / "run")) == 1
    error = capfd.readouterr().err
    assert error.startswith("r1mega: rank 2 of 4 failed first (exit code 1)")
    assert "no luck" in error


def test_only_the_cpu_goes_without_compilation() -> None:
    cpu, cuda = local.worker_env(DeviceType.cpu, 1), local.worker_env(DeviceType.cuda, 1)
    assert cpu["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in cuda
    assert cuda["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    # Below those of outgoing connections: seconds pass before rank 0 listens on it.
    assert 20_000 <= int(cpu["MASTER_PORT"]) < 32_768
