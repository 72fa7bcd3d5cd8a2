"""Overlaps against a search by brute force, and what must not count as one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from r1mega.curation.decontaminate import Benchmarks, read_benchmarks
from r1mega.curation.texts import words

QUESTION = "A train leaves the station at noon and travels at sixty miles an hour for three hours"


def test_one_word_more_or_less() -> None:
    """Ten words in a row are an overlap, nine are none."""
    benchmarks = Benchmarks([("aime", QUESTION)], n=10)
    row = words(QUESTION)
    inside = [" ".join(["Today", *row[3:13], "indeed"]), " ".join(["Today", *row[3:12], "indeed"])]
    assert benchmarks.matches(inside) == ["aime", None]
    assert benchmarks.matches([QUESTION.upper().replace(" ", ",  "), "", "?!"]) == ["aime", None, None]
    assert len(benchmarks) == len(row) - 9


def test_short_texts_are_compared_as_a_whole() -> None:
    benchmarks = Benchmarks([("sums", "12+30"), ("aime", QUESTION)], n=10)
    assert benchmarks.matches(["12 + 30 =", "112+30", "what is 12+30", "30+12", "A train leaves the station"]) == [
        "sums", None, None, None, None,
    ]  # fmt: skip


def test_against_brute_force() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{k}" for k in range(6)]  # so few that overlaps are many

    def text() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randrange(0, 14)))

    known, asked, n = [text() for _ in range(30)], [text() for _ in range(400)], 4

    def grams(one: str) -> set[tuple[str, ...]]:
        row = words(one)
        return {tuple(row[i : i + n]) for i in range(len(row) - n + 1)} or ({tuple(row)} if row else set())

    index = set().union(*map(grams, known))
    expected = [bool(grams(one) & index) for one in asked]
    found = [match is not None for match in Benchmarks([("b", one) for one in known], n).matches(asked)]
    assert found == expected and 20 < sum(expected) < 380


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    rows = [{"problem": QUESTION, "solution": "so we multiply sixty by three and get one hundred eighty miles"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = read_benchmarks([str(path)], ["question", "problem", "solution"], 10)
    asked = [QUESTION, "We multiply sixty by three and get one hundred eighty miles", "Why?"]
    assert benchmarks.matches(asked) == ["aime.jsonl", "aime.jsonl", None]
    with pytest.raises(ValueError, match=r"aime.jsonl:1: none of question, text holds text; the keys there are prob"):
        read_benchmarks([str(path)], ["question", "text"], 10)
    with pytest.raises(ValueError, match="got n=0"):
        Benchmarks([], 0)
    assert Benchmarks([], 10).matches(["a"]) == [None]
