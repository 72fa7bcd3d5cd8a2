from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from r1mega import metrics
from r1mega.metrics.history import read_metrics
from r1mega.metrics.sinks import JsonlSink, Sinks, TensorBoardSink, WandbOptions, WandbSink, open_sinks


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def strict_lines(path: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_line(tmp_path: Path) -> None:
    clock = Clock()
    sink = JsonlSink(tmp_path / "metrics.jsonl", clock=clock)
    clock.now += 1.5
    sink.write(3, {"round": 2, "train/loss": 0.25, "train/kl": math.nan, "train/grad_norm": math.inf})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {
            "update": 3,
            "round": 2,
            "time": 1.5,
            "train/loss": 0.25,
            "train/kl": None,
            "train/grad_norm": None,
            "nonfinite": ["train/kl", "train/grad_norm"],
        }
    ]
    sink.close()


def test_jsonl_clock_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for start in (0.0, 1000.0):
        clock = Clock()
        clock.now = start
        sink = JsonlSink(path, clock=clock)
        clock.now += 10
        sink.write(1, {"a": 1})
        sink.close()
    assert [record["time"] for record in read_metrics(path)] == [10.0, 20.0]


@pytest.mark.parametrize("name", ["update", "time", "nonfinite"])
def test_jsonl_reserved_names(tmp_path: Path, name: str) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=f"metric '{name}' is a name"):
        sink.write(1, {name: 1.0})
    sink.close()


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_values_come_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": step / 4, "eval/pass_at_1": 0.5})
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_tensorboard_restart_replaces_what_it_does_again(tmp_path: Path) -> None:
    for steps, value in (((1, 2, 3), 1.0), ((2, 3), 2.0)):
        sink = TensorBoardSink(tmp_path)
        for step in steps:
            sink.write(step, {"x": value})
        sink.close()
    assert scalars(tmp_path, "x") == [(1, 1.0), (2, 2.0), (3, 2.0)]


class FakeWandb:
    """Wandb's three calls as its reference documents them: init, Run.log(data, step=), Run.finish()."""

    class Error(Exception):
        pass

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.inits, self.logs, self.finished = fail, [], [], 0

    def init(self, **kwargs: object) -> SimpleNamespace:
        if self.fail:
            raise self.Error("api_key not configured")
        self.inits.append(kwargs)
        return SimpleNamespace(log=lambda data, step: self.logs.append((step, data)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink(tmp_path, WandbOptions(project="p", name="n", config={"lr": 1}))
    sink.write(4, {"train/loss": 1})
    sink.close()
    assert fake.inits == [{"project": "p", "name": "n", "dir": str(tmp_path), "mode": "offline", "config": {"lr": 1}}]
    assert fake.logs == [(4, {"train/loss": 1.0})]
    assert fake.finished == 1


def test_wandb_missing_or_without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does to forbid an import
    with pytest.raises(ValueError, match="pip install wandb"):
        WandbSink(tmp_path, WandbOptions())
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail=True))
    with pytest.raises(ValueError, match="mode online .api_key not configured.*logger.wandb_mode=offline"):
        WandbSink(tmp_path, WandbOptions(mode="online"))


def test_open_sinks_writes_to_all(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_sinks(run_dir, jsonl=True, tensorboard=True) as sinks:
        sinks.write(1, {"round": 1, "reward/mean": 0.5})
    assert read_metrics(run_dir / "metrics.jsonl")[0]["reward/mean"] == 0.5
    assert scalars(run_dir / "tensorboard", "reward/mean") == [(1, 0.5)]
    with open_sinks(tmp_path / "none", jsonl=False) as sinks:
        sinks.write(1, {"a": 1})
    assert list((tmp_path / "none").iterdir()) == []


class Recorder:
    def __init__(self, fail: bool = False) -> None:
        self.fail, self.closed = fail, 0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        raise AssertionError("not written to in these tests")

    def close(self) -> None:
        self.closed += 1
        if self.fail:
            raise OSError("disk full")


def test_every_sink_is_closed_once_though_one_fails() -> None:
    recorders = [Recorder(), Recorder(fail=True), Recorder()]
    sinks = Sinks(recorders)
    with pytest.raises(OSError, match="disk full"):
        sinks.close()
    sinks.close()
    assert [recorder.closed for recorder in recorders] == [1, 1, 1]


def test_sinks_opened_before_a_failure_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Path] = []
    monkeypatch.setattr(JsonlSink, "close", lambda self: closed.append(self._writer.path))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        open_sinks(tmp_path, jsonl=True, wandb=WandbOptions())
    assert closed == [tmp_path / "metrics.jsonl"]


def test_no_module_here_imports_torch() -> None:
    folder = Path(metrics.__file__).parent
    imports = "; ".join(f"import r1mega.metrics.{path.stem}" for path in sorted(folder.glob("[!_]*.py")))
    assert "r1mega.metrics.sinks" in imports
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
