from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from r1mega.metrics import plots
from r1mega.metrics.plots import plot_run


def rl_records(updates: int = 40) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for update in range(updates + 1):
        learned = 1 / (1 + math.exp(-(update - 15) / 5))
        record: dict[str, Any] = {"update": update, "round": (update + 3) // 4}
        if update % 10 == 0:
            record |= {"eval/pass_at_1": 0.2 + 0.6 * learned, "eval/response_tokens": 18 + 15 * learned}
        if update:
            record |= {
                "reward/accuracy": 0.25 + 0.6 * learned,
                "rollout/response_tokens": 18 + 15 * learned,
                "rollout/response_tokens_max": 60.0,
                "train/loss": 0.02 * math.sin(update),
                "train/kl": 0.02 * learned,
                "train/clip_fraction": 0.01,
                "train/grad_norm": None if update == 7 else 0.3,
                "train/entropy": 0.6 - 0.4 * learned,
                "sync/logprob_gap_mean": 3e-7,
                "sync/logprob_gap_max": 4e-6,
            }
            if update == 7:
                record["nonfinite"] = ["train/grad_norm"]
            if update % 4 == 0:
                record |= {"time/rollout": 2.0, "time/train": 1.5, "time/own_phase": 0.2}
        records.append(record)
    return records


def make_run(directory: Path, records: list[dict[str, Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def colored_pixels(path: Path, color: str) -> int:
    """How many pixels have exactly the colour of a line drawn without transparency."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    with Image.open(path) as image:
        return sum(count for count, pixel in image.convert("RGB").getcolors(1 << 24) if pixel == wanted)


def test_rl_run(tmp_path: Path) -> None:
    curves, training = plot_run(make_run(tmp_path / "run", rl_records()))
    assert (curves.name, training.name) == ("curves.png", "training.png")
    with Image.open(curves) as image:
        assert image.size == (1740, 630)  # two panels side by side
        assert round(image.info["dpi"][0]) == 150
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    with Image.open(training) as image:
        assert image.size == (1980, 1410)  # three rows of three: six panels of lines, phases
    assert colored_pixels(curves, plots.BLUE) > 1000  # held-out pass@1
    assert colored_pixels(curves, plots.GREEN) > 1000  # response length
    assert colored_pixels(training, plots.RED) > 200  # largest log-prob gap
    assert colored_pixels(training, plots.PHASE_COLORS["train"]) > 1000


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    keep = {"update", "round", "rollout/response_tokens"}
    records = [{k: v for k, v in record.items() if k in keep} for record in rl_records()]
    (curves,) = plot_run(make_run(tmp_path / "run", records))  # no training.png: nothing to show there
    with Image.open(curves) as image:
        assert image.size == (900, 630)  # one panel
    assert colored_pixels(curves, plots.GREEN) > 1000
    assert colored_pixels(curves, plots.BLUE) == 0  # the accuracy curve of test_rl_run is absent here


def test_sft_run_has_only_training_curves(tmp_path: Path) -> None:
    records = [{"update": u, "round": 0, "train/loss": 3 / (1 + u), "train/lr": 1e-3} for u in range(5)]
    (training,) = plot_run(make_run(tmp_path / "run", records))
    assert training.name == "training.png"
    assert colored_pixels(training, plots.BLUE) > 500


def test_many_rounds_become_an_area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "BARS_UP_TO", 5)
    timed = [{k: v for k, v in r.items() if k in ("update", "round") or k.startswith("time/")} for r in rl_records()]
    run = make_run(tmp_path / "run", timed)
    (training,) = plot_run(run)
    area = colored_pixels(training, plots.PHASE_COLORS["rollout"])
    monkeypatch.undo()
    plot_run(run)
    assert area > 1.05 * colored_pixels(training, plots.PHASE_COLORS["rollout"]) > 1000  # bars leave gaps


def test_a_single_point_is_seen(tmp_path: Path) -> None:
    records = [{"update": 4, "round": 1, "eval/pass_at_1": 0.5, "train/loss": 0.1}]
    curves, training = plot_run(make_run(tmp_path / "run", records))
    assert colored_pixels(curves, plots.BLUE) > 50
    assert colored_pixels(training, plots.BLUE) > 20


def test_title_comes_from_the_summary(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert plots._default_title(run) == "run"
    (run / "summary.json").write_text(json.dumps({"model": "tiny", "layout": "tp2 pp2", "seed": 0}))
    assert plots._default_title(run) == "run  ·  tiny  ·  tp2 pp2  ·  seed 0"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_run(tmp_path)
    empty = make_run(tmp_path / "empty", [{"update": 1, "round": 1, "train/loss": None, "other": 3.0}])
    with pytest.raises(ValueError, match="no finite value"):
        plot_run(empty)
    assert sorted(path.name for path in empty.iterdir()) == ["metrics.jsonl"]


def test_length_band_prefers_the_spread_that_was_measured() -> None:
    record = {"update": 1, "round": 1, "rollout/response_tokens": 20.0}
    mean = ([1], [20.0])
    assert plots._length_band([record], mean) is None
    record["rollout/response_tokens_max"] = 50.0
    assert plots._length_band([record], mean) == ([1], [20.0], [50.0], "mean to longest")
    record["rollout/response_tokens_min"] = 5.0
    assert plots._length_band([record], mean) == ([1], [5.0], [50.0], "shortest to longest")
    record["rollout/response_tokens_std"] = 30.0
    assert plots._length_band([record], mean) == ([1], [0.0], [50.0], "one standard deviation")


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    line = [float(i) for i in range(100)]
    smooth = plots._smooth(line)
    assert smooth[10:90] == pytest.approx(line[10:90])
    assert plots._smooth([0.0, 0.0, 3.0, 0.0, 0.0]) == [0.0, 1.0, 1.0, 1.0, 0.0]
