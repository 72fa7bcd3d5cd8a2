"""Every artifact reaches its sources, and a lineage that does not is told from one that does."""

from __future__ import annotations

import pytest

from r1mega.pipeline import lineage


def test_it_holds_what_was_read_and_left(stubs) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    found = stubs.lineage()
    assert lineage.problems(found) == []
    program = f"program:{stubs.program}"
    assert lineage.ancestors(found, "left.out") == {"base.out", "questions", program}
    assert lineage.ancestors(found, "join.out") == {
        "base.out", "left.out", "right.out", "questions", "more", program
    }  # fmt: skip
    assert {node["id"]: node["stage"] for node in found["nodes"]} == {
        "questions": None, "more": None, program: None, "base.out": "base", "left.out": "left", "right.out": "right",
        "join.out": "join",
    }  # fmt: skip
    assert [set(node) for node in found["nodes"]] == [{"id", "kind", "path", "sha256", "stage", "counts"}] * 7
    assert [set(line) for line in found["stages"]] == [
        {"name", "about", "key", "seconds", "counts", "code", "config"}
    ] * 4


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda found: found["edges"].clear(), "does not reach its sources"),
        (lambda found: found["nodes"].pop(0), "which is no node"),
        (
            lambda found: found["edges"].append({"from": "join.out", "to": "base.out", "stage": "base"}),
            "made of itself",
        ),
        (lambda found: found["edges"].append({"from": "base.out", "to": "more", "stage": "base"}), "is a source"),
        (lambda found: found["nodes"].append({"id": "x.out", "stage": "x"}), "x.out does not reach its sources"),
    ],
)
def test_what_does_not_reach_them_is_told(stubs, spoil, word) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    found = stubs.lineage()
    spoil(found)
    assert any(word in line for line in lineage.problems(found))
