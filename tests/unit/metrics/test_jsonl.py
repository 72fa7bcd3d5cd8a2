from __future__ import annotations

import math
from pathlib import Path

import pytest

from r1mega.metrics.jsonl import JsonlWriter, read_jsonl, split_nonfinite


def test_round_trip_is_readable_before_the_writer_closes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    writer = JsonlWriter(path)
    writer.append({"a": 1, "text": "日本\n\u2028 x"})
    writer.append({"a": None})
    assert list(read_jsonl(path)) == [(1, {"a": 1, "text": "日本\n\u2028 x"}), (2, {"a": None})]
    writer.close()
    writer.close()


def test_a_killed_writer_costs_one_line_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "te')
    assert list(read_jsonl(path)) == [(1, {"a": 1})]
    writer = JsonlWriter(path)
    writer.append({"a": 3})
    writer.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_a_complete_last_line_without_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{oops}\n", "not valid JSON"),
        (b"[1, 2]\n", "expected a JSON object, got list"),
        (b'{"a": NaN}\n', "NaN is no JSON number"),
        (b'{"a": "\xff"}\n', "not valid JSON"),
        (b'{"a": 1\n', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'{"a": 2}\n')
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: .*{said}"):
        list(read_jsonl(path))


def test_writing_a_nan_is_refused_rather_than_making_invalid_json(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        writer.append({"a": math.nan})
    writer.append({"a": 1})
    assert list(read_jsonl(writer.path)) == [(1, {"a": 1})]
    writer.close()


def test_split_nonfinite() -> None:
    values = {"a": 1.5, "b": math.nan, "c": -math.inf, "d": "text", "e": None}
    assert split_nonfinite(values) == ({"a": 1.5, "b": None, "c": None, "d": "text", "e": None}, ["b", "c"])
