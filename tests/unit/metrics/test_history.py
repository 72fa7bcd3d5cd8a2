from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from r1mega.metrics.history import phase_seconds, read_metrics, series


def test_read_metrics_gives_nan_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "round": 0, "time": 2.5, "a": null, "b": 3.0, "nonfinite": ["a"]}\n')
    (record,) = read_metrics(path)
    assert math.isnan(record.pop("a"))
    assert record == {"update": 1, "round": 0, "time": 2.5, "b": 3.0}


@pytest.mark.parametrize(
    "line", [{"round": 1}, {"update": 1}, {"update": 1.5, "round": 1}, {"update": True, "round": 1}]
)
def test_a_record_without_its_counters_is_named(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 0, "round": 0}\n' + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: (update|round) is .*, expected an integer"):
        read_metrics(path)


def test_series_takes_the_later_record_of_an_update_and_leaves_out_gaps() -> None:
    records = [
        {"update": 1, "round": 1, "x": 1.0},
        {"update": 2, "round": 1, "x": 2.0},
        {"update": 3, "round": 2, "x": 3.0},
        {"update": 2, "round": 1, "x": 20.0},  # resumed from update 1
        {"update": 3, "round": 2},
        {"update": 4, "round": 2, "x": math.nan},
    ]
    assert series(records, "x") == ([1, 2, 3], [1.0, 20.0, 3.0])
    assert series(records, "y") == ([], [])


def test_phase_seconds_are_per_round() -> None:
    records = [
        {"update": 0, "round": 0, "eval/pass_at_1": 0.1},
        {"update": 1, "round": 1, "time/rollout": 2.0},
        {"update": 2, "round": 1, "time/rollout": 2.0, "time/train": 1.0},  # the same round again: not 4 seconds
        {"update": 4, "round": 2, "time/rollout": 3.0, "time/evaluate": math.nan},
    ]
    assert phase_seconds(records) == ("round", [2, 4], {"rollout": [2.0, 3.0], "train": [1.0, 0.0]})


def test_phase_seconds_of_a_run_without_rounds_are_per_update() -> None:
    records = [{"update": update, "round": 0, "time/train": update / 2} for update in (1, 2, 3)]
    assert phase_seconds(records) == ("update", [1, 2, 3], {"train": [0.5, 1.0, 1.5]})
