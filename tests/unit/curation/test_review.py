"""A review file goes out and comes back: what an annotator may do, and every way to break it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega.curation.review import COLUMNS, read_originals, read_review, write_review

REPO = Path(__file__).resolve().parents[3]
ROWS = [
    {"prompt": "1+1", "response": "<think>one,\n\"more\"</think> 2", "id": "f:1#0", "provenance": {"way": "direct"}},
    {"prompt": "2+2", "response": "<think>哦, four</think> 4", "id": "f:2#3"},
    {"prompt": "3+3", "response": "<think>?</think> 6"},
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "curated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def edit(path: Path, change: Callable[[list[dict]], list[dict] | None]) -> None:
    """What an annotator does, in either format."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(csv.DictReader(file))
    else:
        found = [json.loads(line) for line in path.read_text().splitlines()]
    found = change(found) or found
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


def has_thinking(text: str) -> bool:
    return "</think>" in text


def decide(found: list[dict]) -> None:
    for row, keep in zip(found, ("yes", "No", "Y"), strict=True):
        row["keep"] = keep


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_there_and_back(rows: Path, tmp_path: Path, ending: str) -> None:
    originals, path = read_originals(rows), tmp_path / f"review{ending}"
    write_review(originals, path)

    def work(found: list[dict]) -> None:
        assert [list(row) for row in found] == [list(COLUMNS)] * 3 and not any(row["keep"] for row in found)
        decide(found)
        found[2] |= {"edited_response": "<think>three and three\r\nare six</think> 6", "note": "said more"}
        found.reverse()  # the order is the annotator's affair

    edit(path, work)
    kept, counts = read_review(originals, path, has_thinking)
    assert counts == {"given": 3, "kept": 2, "edited": 1, "dropped": 1}
    assert kept[0] == ROWS[0] | {"provenance": {"way": "direct", "review": {"edited": False}}}
    assert kept[1]["response"] == "<think>three and three\nare six</think> 6"
    assert kept[1]["provenance"] == {"review": {"edited": True, "note": "said more"}}
    assert kept[1]["id"] == f"{rows}:3"


def drop_one(found: list[dict]) -> list[dict]:
    return found[:2]


def twice(found: list[dict]) -> list[dict]:
    return [*found, found[0]]


def set_(number: int, **values: str) -> Callable[[list[dict]], None]:
    return lambda found: found[number].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"row '.*curated.jsonl:3' is missing"),
        (twice, "id 'f:1#0' stands twice"),
        (set_(1, id="f:9"), r"id 'f:9' was not given out[\s\S]*row 'f:2#3' is missing"),
        (set_(0, prompt="1+2"), "prompt of 'f:1#0' is not as it was given out"),
        (set_(0, response="<think>x</think> 2"), "response of 'f:1#0' is not as .*; write changes under edited_resp"),
        (set_(1, keep=""), "keep of 'f:2#3': got ''; write yes or no"),
        (set_(1, keep="perhaps"), "got 'perhaps'"),
        (set_(0, edited_response="two"), "edited_response of 'f:1#0' is broken"),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_every_fault_is_named(rows: Path, tmp_path: Path, ending: str, change: Callable, message: str) -> None:
    originals, path = read_originals(rows), tmp_path / f"review{ending}"
    write_review(originals, path)
    edit(path, decide)
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        read_review(originals, path, has_thinking)


def test_a_file_that_is_no_review(rows: Path, tmp_path: Path) -> None:
    originals = read_originals(rows)
    with pytest.raises(ValueError, match=r"must end in .csv or .jsonl"):
        write_review(originals, tmp_path / "review.txt")
    (tmp_path / "a.csv").write_text("id,keep\nf:1#0,yes\n")
    with pytest.raises(ValueError, match="prompt, response, edited_response, note must be there as text"):
        read_review(originals, tmp_path / "a.csv", has_thinking)
    rows.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match="stands twice"):
        read_originals(rows)


def test_the_program(rows: Path, tmp_path: Path) -> None:
    review, out = tmp_path / "review.csv", tmp_path / "reviewed.jsonl"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(REPO / "tools" / "review_rows.py"), *arguments, "--rows", str(rows)]
        return subprocess.run([*argv, "--review", str(review)], capture_output=True, text=True, timeout=120)

    assert json.loads(call("export").stdout) == {"given": 3}
    refused = call("export")
    assert refused.returncode == 2 and "is there already" in refused.stderr
    undecided = call("import", "--out", str(out))
    assert undecided.returncode == 2 and "3 faults" in undecided.stderr and not out.exists()
    edit(review, decide)
    done = call("import", "--out", str(out), "--special-tokens", "|special_token|", "|special_token|")
    assert json.loads(done.stdout) == {"given": 3, "kept": 2, "edited": 0, "dropped": 1}, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1]["response"] == "|special_token|?|special_token|6"
