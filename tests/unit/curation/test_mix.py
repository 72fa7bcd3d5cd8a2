from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.mix import Source, check_sources, mix
from r1mega.data.sft import iter_sft

REPO = Path(__file__).resolve().parents[3]


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    reasoning = [
        {"prompt": f"{k}+1", "response": f"<think>{k}</think> {k + 1}", "provenance": {"way": "rejection"}}
        for k in range(12)
    ]
    other = [{"prompt": f"Write about {k}.", "response": f"It is {k}."} for k in range(6)]
    other.append({"prompt": "3 + 1", "response": "<think> 3 </think> 4!"})  # the words of a reasoning row
    return write(tmp_path / "r.jsonl", *reasoning), write(tmp_path / "w.jsonl", *other)


def test_what_becomes_of_every_row(files: tuple[str, str]) -> None:
    sources = [Source("reasoning", files[0], limit=8), Source("writing", files[1])]
    found = mix(sources, seed=1, benchmarks=Benchmarks([("b", "7 + 1")], 10))
    assert found.counts == {
        "reasoning": {"read": 12, "contaminated": 1, "kept": 8, "over_limit": 3},
        "writing": {"read": 7, "duplicate": 1, "kept": 6},
    }
    assert len(found.rows) == 14
    assert not any(row["prompt"] == "7+1" for row in found.rows)
    first, last = found.rows[0], found.rows[-1]
    assert first["provenance"]["source"] == "reasoning" and first["provenance"]["way"] == "rejection"
    assert last["provenance"] == {"source": "writing", "row": f"{files[1]}:6"}
    places = [int(row["provenance"]["row"].rpartition(":")[2]) for row in found.rows[:8]]
    assert places == sorted(places)
    assert mix(sources, seed=1, benchmarks=Benchmarks([("b", "7 + 1")], 10)) == found
    assert mix(sources, seed=2).rows[:8] != mix(sources, seed=3).rows[:8]


def test_shares_give_the_largest_mixture(files: tuple[str, str]) -> None:
    """12 and 6 different rows, the last of writing a duplicate: at 3 to 1, 12 go with 4; at 1 to 3, 2 with 6."""
    for share, expected in ((0.75, (12, 4)), (0.25, (2, 6))):
        sources = [Source("a", files[0], share=share), Source("b", files[1], share=1 - share)]
        found = mix(sources).counts
        assert (found["a"]["kept"], found["b"]["kept"]) == expected
        assert found["b"].get("over_share", 0) == 6 - expected[1]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Source("a", "x"), Source("a", "y")], "a name of its own"),
        ([Source("a", "x", limit=0)], "limit of a: got 0"),
        ([Source("a", "x", share=0.5), Source("b", "y")], "give one to every source"),
        ([Source("a", "x", share=0.5), Source("b", "y", share=0.6)], "add up to 1"),
    ],
)
def test_sources_are_checked(sources: list[Source], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources(sources)


def test_the_program(files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "sft.jsonl"
    argv = [
        sys.executable, str(REPO / "tools" / "mix_sft.py"), "--out", str(out), "--source", f"reasoning={files[0]}",
        "--source", f"writing={files[1]}", "--limit", "reasoning=5", "--special-tokens", "|t|", "|t|",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows"] == 11 == len(list(iter_sft(out))) and summary["sources"]["writing"]["kept"] == 6
    assert json.loads((tmp_path / "sft.jsonl.counts.json").read_text()) == summary
    responses = [row.response for row in iter_sft(out)]
    assert responses[0].startswith("|t|") and responses[0].count("|t|") == 2 and responses[-1] == "It is 5."
    wrong = subprocess.run([*argv, "--limit", "poems=1"], capture_output=True, text=True, timeout=120, check=False)
    assert wrong.returncode == 2 and "--limit: got poems; the sources are reasoning, writing" in wrong.stderr
