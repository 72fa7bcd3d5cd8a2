"""tools/mix_rows.py joins rows, each once, in an order of the seed's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mix_rows

ROWS = [{"prompt": f"{i}?", "response": str(i)} for i in range(20)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mix(monkeypatch, out: Path, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["mix_rows.py", "--out", str(out), *map(str, words)])
    return mix_rows.main()


def test_every_row_is_there_once(tmp_path, monkeypatch, capsys) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS[:12]), write(tmp_path / "b.jsonl", ROWS[10:])]
    orders = {}
    for seed in (0, 1, 0):
        out = tmp_path / f"out{seed}.jsonl"
        assert mix(monkeypatch, out, *files, "--seed", seed, "--keys", "prompt,response") == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["rows"], said["twice"]) == (20, 2)
        text = out.read_text()
        assert orders.setdefault(seed, text) == text, "one seed, one order"
        found = [json.loads(line) for line in text.splitlines()]
        assert sorted(found, key=lambda row: int(row["response"])) == ROWS
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("line", "words"), [("{", "not JSON"), ("[]", "no JSON object"), ('{"a": 1}', "lacks prompt")])
def test_a_bad_row_is_named(tmp_path, monkeypatch, capsys, line, words) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    assert mix(monkeypatch, tmp_path / "out.jsonl", bad, "--keys", "prompt") == 2
    said = capsys.readouterr().err
    assert "bad.jsonl:2" in said and words in said
    assert not (tmp_path / "out.jsonl").exists()
