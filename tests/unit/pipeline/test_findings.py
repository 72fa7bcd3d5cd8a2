"""A finding says no more than its figures."""

from __future__ import annotations

import pytest

from r1mega.config.choices import Direction
from r1mega.config.schema_pipeline import PipelineFinding
from r1mega.pipeline.report import finding


def measured(*pairs: tuple[float, float]) -> list[dict[str, dict[str, float]]]:
    return [{"new": {"pass_at_1": value}, "old": {"pass_at_1": baseline}} for value, baseline in pairs]


def found(pairs, **changes) -> dict:
    return finding("f", PipelineFinding("new beats old", "new", "pass_at_1", "old", **changes), measured(*pairs))


def test_one_seed() -> None:
    said = found([(0.5, 0.25)])
    keys = ["name", "claim", "value", "baseline", "difference", "interval", "holds", "note"]
    assert list(said) == keys
    assert [said[key] for key in keys[2:7]] == [0.5, 0.25, 0.25, None, True]
    assert "one seed: nothing is said of the spread" in said["note"]
    assert not found([(0.25, 0.25)])["holds"]


def test_seeds_that_agree_and_seeds_that_do_not() -> None:
    said = found([(0.5, 0.2), (0.6, 0.2), (0.7, 0.2)])
    # 0.4 and 0.1 / sqrt(3) of standard error, times Student's t of two degrees of freedom, 4.3027 in any table.
    assert said["interval"] == pytest.approx([0.4 - 0.24841, 0.4 + 0.24841], abs=1e-4) and said["holds"]
    assert said["difference"] == pytest.approx(0.4)
    said = found([(0.21, 0.2), (0.4, 0.2), (0.7, 0.2)])  # all better, and too far apart to tell
    assert not said["holds"] and said["note"].startswith("so in 3 of 3 seeds; 95% interval")
    said = found([(0.9, 0.2), (0.1, 0.2), (0.9, 0.2)])  # better in the mean, and one seed says the contrary
    assert said["difference"] > 0.4 and not said["holds"] and said["note"].startswith("so in 2 of 3 seeds")


def test_directions_and_margins() -> None:
    assert found([(0.2, 0.5)], direction=Direction.lower)["holds"]
    assert not found([(0.2, 0.5)])["holds"]
    assert not found([(0.2, 0.5)], direction=Direction.lower, margin=0.4)["holds"]
    # "At a small cost": worse by less than 0.05.
    assert found([(0.48, 0.5)], margin=-0.05)["holds"]
    assert not found([(0.44, 0.5)], margin=-0.05)["holds"]
    lower = found([(0.2, 0.5), (0.21, 0.5), (0.22, 0.5)], direction=Direction.lower)
    assert lower["holds"] and lower["interval"][1] < 0 and lower["note"].startswith("so in 3 of 3 seeds")
    assert not found([(0.2, 0.5), (0.6, 0.5)], direction=Direction.lower)["holds"]


def test_a_figure_that_is_missing() -> None:
    said = finding("f", PipelineFinding("c", "new", "pass_at_1", "old"), [{"new": {"pass_at_1": 1.0}}])
    assert said["holds"] is None and said["value"] is None
    assert "not measured in 1 of 1 seeds" in said["note"]
    said = finding("f", PipelineFinding("c", "new", "pass_at_1", "old"), [*measured((1.0, 0.0)), {}])
    assert said["holds"] is None and said["difference"] == 1.0 and said["interval"] is None
