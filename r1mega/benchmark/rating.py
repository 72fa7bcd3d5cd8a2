"""The rating that a model would have on Codeforces, from what it solved in contests that people took part in.

Codeforces' ratings are Elo's for many players (M. Mirzayanov, https://codeforces.com/blog/entry/20762): player i does
better than player j with probability 1 / (1 + 10^((r_j - r_i) / 400)), and the place that is expected of one is 1 plus
the sum of the others' chances to do better. The rating here is the one whose expected place is the place that was
reached, contest by contest, and then the mean over contests, as CodeElo does (Quan et al. 2025, arXiv 2501.01257).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.data.jsonl import read_rows

LOWEST, HIGHEST = 0.0, 4000.0
WRONG_POINTS, WRONG_MINUTES = 50.0, 10.0  # what a rejected submission costs where the problem is solved in the end
_LEAST_SHARE, _POINTS_PER_MINUTE = 0.3, 1 / 250
POINTS, ICPC = "points", "icpc"


@dataclass(frozen=True)
class Entry:
    """One participant: rating before the contest, points (in `icpc` contests problems solved) and penalty."""

    rating: float
    points: float
    penalty: float = 0.0


@dataclass(frozen=True)
class Contest:
    """A contest and its final standings. `worth` is the points of each problem by its index; `scoring` is `points`
    (div. 1 and 2 rounds) or `icpc` (educational and div. 3 rounds)."""

    name: str
    scoring: str
    worth: Mapping[str, float]
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Outcome:
    """What became of one problem: rejected submissions before the accepted one, or in all where none was accepted."""

    solved: bool
    wrong: int
    minutes: float = 0.0


def outcome(rights: Sequence[bool], minutes: float = 0.0) -> Outcome:
    """Samples of one problem as submissions, handed in one after the other until one is right."""
    for number, right in enumerate(rights):
        if right:
            return Outcome(True, number, minutes)
    return Outcome(False, len(rights), minutes)


def result(contest: Contest, outcomes: Mapping[str, Outcome]) -> tuple[float, float]:
    """(points, penalty) by Codeforces' rules.

    `points`: a problem loses 1/250 of its worth a minute and 50 points a rejected submission, and keeps 30% at least.
    `icpc`: one point a problem; the minutes, and 10 more a rejected submission, are the penalty. What is never solved
    costs nothing. Raises ValueError on a problem that the contest does not have.
    """
    points = penalty = 0.0
    for index, found in outcomes.items():
        if index not in contest.worth:
            raise ValueError(f"contest {contest.name} has no problem {index!r}; it has {', '.join(contest.worth)}")
        if not found.solved:
            continue
        if contest.scoring == ICPC:
            points += 1
            penalty += found.minutes + WRONG_MINUTES * found.wrong
        else:
            worth = contest.worth[index]
            left = worth - worth * _POINTS_PER_MINUTE * found.minutes - WRONG_POINTS * found.wrong
            points += max(_LEAST_SHARE * worth, left)
    return points, penalty


def rank(contest: Contest, points: float, penalty: float) -> int:
    """The place among the participants, from 1; like Codeforces' ratings it puts all of a tie at its last place."""
    return 1 + sum((-e.points, e.penalty) <= (-points, penalty) for e in contest.entries)


def expected_place(rating: float, others: Sequence[float]) -> float:
    """1 plus the chances of each of the others to do better."""
    return 1.0 + sum(1.0 / (1.0 + 10.0 ** ((rating - other) / 400.0)) for other in others)


def performance(place: float, others: Sequence[float]) -> float:
    """The rating that `place` is expected of, found by halving; between 0 and 4,000, which the first and the last place
    come to."""
    low, high = LOWEST, HIGHEST
    for _ in range(60):
        middle = (low + high) / 2
        if expected_place(middle, others) > place:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def rate(contest: Contest, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """`points`, `penalty`, `place` and `rating` of one contest, and the share of its participants rated below, in
    percent."""
    ratings = [entry.rating for entry in contest.entries]
    points, penalty = result(contest, outcomes)
    place = rank(contest, points, penalty)
    rating = performance(place, ratings)
    below = 100.0 * sum(other < rating for other in ratings) / len(ratings)
    return {"points": points, "penalty": penalty, "place": place, "rating": rating, "percentile": below}


def read_standings(path: str | Path) -> dict[str, Contest]:
    """The contests of a JSONL file, one a line, by name.

    {"contest": "1969", "scoring": "points", "problems": {"A": 500, ...},
     "standings": [{"rating": 1500, "points": 1874, "penalty": 0}, ...]}

    Raises ValueError naming `path:line`.
    """
    found = {}
    for line, row in read_rows(path, ("contest",)):
        try:
            contest = _contest(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}:{line}: {type(error).__name__} {error}; a line holds contest, scoring (points or icpc), "
                "problems (index to points) and standings (a list of rating, points and penalty)"
            ) from error
        found[contest.name] = contest
    return found


def _contest(row: Mapping[str, Any]) -> Contest:
    scoring = row.get("scoring", POINTS)
    if scoring not in (POINTS, ICPC):
        raise ValueError(f"scoring is {scoring!r}")
    entries = [
        Entry(float(entry["rating"]), float(entry["points"]), float(entry.get("penalty", 0)))
        for entry in row["standings"]
    ]
    if not entries:
        raise ValueError("standings are empty")
    worth = {str(index): float(points) for index, points in row["problems"].items()}
    return Contest(str(row["contest"]), scoring, worth, entries)
