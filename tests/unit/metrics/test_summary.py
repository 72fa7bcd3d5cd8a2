from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from r1mega.metrics.summary import REQUIRED, summarize_metrics, write_summary

RECORDS = [
    {"update": 0, "round": 0, "time": 1.0, "eval/pass_at_1": 0.25, "eval/response_tokens": 18.0},
    {"update": 1, "round": 1, "time": 2.0, "rollout/response_tokens": 20.0},
    {"update": 2, "round": 1, "time": 3.5, "eval/pass_at_1": 0.75, "eval/response_tokens": 33.0},
    {"update": 3, "round": 2, "time": 4.0, "rollout/response_tokens": 30.0},
]


def test_first_and_last() -> None:
    assert summarize_metrics(RECORDS) == {
        "pass_at_1_first": 0.25,
        "pass_at_1_last": 0.75,
        "response_tokens_first": 18.0,
        "response_tokens_last": 33.0,
        "updates": 3,
        "rounds": 2,
        "seconds": 4.0,
    }


def test_what_was_not_measured_is_none() -> None:
    without_eval = [{k: v for k, v in record.items() if not k.startswith("eval/")} for record in RECORDS]
    values = summarize_metrics(without_eval)
    assert (values["pass_at_1_first"], values["pass_at_1_last"]) == (None, None)
    assert (values["response_tokens_first"], values["response_tokens_last"]) == (20.0, 30.0)
    assert summarize_metrics([])["updates"] == 0


def test_written_sorted_and_whole(tmp_path: Path) -> None:
    values = summarize_metrics(RECORDS) | {"world_size": 4, "layout": "tp2 pp2 ep2", "seed": 1, "drift": math.nan}
    path = write_summary(tmp_path, values)
    content = json.loads(path.read_text())
    assert list(content) == sorted(content)
    assert content == values | {"drift": None, "nonfinite": ["drift"]}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_write_leaves_the_old_summary(tmp_path: Path) -> None:
    values = dict.fromkeys(REQUIRED)
    path = write_summary(tmp_path, values | {"seed": 1})
    with pytest.raises(TypeError):
        write_summary(tmp_path, values | {"seed": object()})
    assert json.loads(path.read_text())["seed"] == 1


def test_missing_keys_are_named(tmp_path: Path) -> None:
    values = {key: 0 for key in REQUIRED if key not in ("seed", "layout")}
    with pytest.raises(ValueError, match="summary lacks layout, seed;"):
        write_summary(tmp_path, values)
