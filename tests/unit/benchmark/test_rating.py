"""Codeforces' rating from what was solved, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from r1mega.benchmark.rating import (
    Contest,
    Entry,
    Outcome,
    expected_place,
    outcome,
    performance,
    rank,
    rate,
    read_standings,
    result,
)

CONTEST = Contest(
    "1",
    "points",
    {"A": 500, "B": 1000, "C": 2000},
    [Entry(1900, 3200), Entry(1500, 1400), Entry(1500, 1350), Entry(1100, 450)],
)


def test_the_rating_of_a_place_by_hand() -> None:
    # Four others of 1500 and place 2: each of them does better with chance 1/4, so 10^((r - 1500) / 400) = 3.
    assert performance(2, [1500] * 4) == pytest.approx(1500 + 400 * math.log10(3), abs=1e-6)
    assert performance(2, [1500] * 4) == pytest.approx(1690.848502, abs=1e-6)
    # Place 3 of 4 others: chance 1/2 each. Two others, symmetric about 1400, and place 2.
    assert performance(3, [1500] * 4) == pytest.approx(1500, abs=1e-6)
    assert performance(2, [1200, 1600]) == pytest.approx(1400, abs=1e-6)
    assert expected_place(1690.848502, [1500] * 4) == pytest.approx(2, abs=1e-9)


def test_a_stronger_player_by_200_does_better_three_times_of_four() -> None:
    # The example in Codeforces' own description of its ratings: about 0.75 at 200 points, about 0.9 at 400.
    assert 2 - expected_place(1700, [1500]) == pytest.approx(0.76, abs=0.005)
    assert 2 - expected_place(1900, [1500]) == pytest.approx(0.909, abs=0.005)


def test_the_first_and_the_last_place_come_to_the_bounds() -> None:
    assert performance(1, [1500]) == pytest.approx(4000, abs=1e-3)
    assert performance(2, [1500]) == pytest.approx(0, abs=1e-3)


def test_points_of_codeforces() -> None:
    # B after two rejected ones at minute 30: 1000 - 1000/250*30 - 100 = 780. C at minute 200 after 9: 30% of 2000.
    solved = {"A": Outcome(True, 0), "B": Outcome(True, 2, 30), "C": Outcome(True, 9, 200)}
    assert result(CONTEST, solved) == (500 + 780 + 600, 0)
    assert result(CONTEST, {"C": Outcome(False, 8)}) == (0, 0)  # rejected ones cost nothing where it is never solved
    icpc = Contest("2", "icpc", CONTEST.worth, CONTEST.entries)
    assert result(icpc, solved) == (3, 0 + (30 + 20) + (200 + 90))
    with pytest.raises(ValueError, match="contest 1 has no problem 'D'"):
        result(CONTEST, {"D": Outcome(True, 0)})


def test_places_with_ties() -> None:
    assert rank(CONTEST, 1500, 0) == 2
    assert rank(CONTEST, 1400, 0) == 3  # behind whom it ties with
    assert rank(CONTEST, 9999, 0) == 1 and rank(CONTEST, 0, 0) == 5
    icpc = Contest("2", "icpc", {"A": 1}, [Entry(1500, 1, 20), Entry(1400, 1, 40)])
    assert rank(icpc, 1, 30) == 2


def test_samples_as_submissions() -> None:
    assert outcome([False, False, True, False]) == Outcome(True, 2)
    assert outcome([False, False]) == Outcome(False, 2)


def test_a_contest_as_a_whole() -> None:
    # A at once and B after one rejected: 500 + 950 points, place 2, so the others' chances to do better sum to 1.
    found = rate(CONTEST, {"A": Outcome(True, 0), "B": Outcome(True, 1)})
    assert (found["points"], found["place"]) == (1450, 2)
    chances = [1 / (1 + 10 ** ((found["rating"] - other) / 400)) for other in (1900, 1500, 1500, 1100)]
    assert sum(chances) == pytest.approx(1, abs=1e-9)
    assert found["percentile"] == 75.0


def test_standings_are_read_and_faults_named(tmp_path) -> None:
    path = tmp_path / "standings.jsonl"
    row = {"contest": 7, "problems": {"A": 500}, "standings": [{"rating": 1500, "points": 500}]}
    path.write_text(json.dumps(row) + "\n")
    assert read_standings(path) == {"7": Contest("7", "points", {"A": 500.0}, [Entry(1500, 500)])}
    for change in ({"scoring": "acm"}, {"standings": []}, {"standings": [{"points": 1}]}, {"problems": None}):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(ValueError, match=r"standings.jsonl:1: .*a line holds contest"):
            read_standings(path)
