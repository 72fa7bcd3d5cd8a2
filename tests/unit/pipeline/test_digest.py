"""Digests follow bytes and names, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from r1mega.config.choices import ArtifactKind
from r1mega.pipeline import digest
from r1mega.pipeline.digest import Digests

CHECKPOINT, REPORT = ArtifactKind.checkpoint, ArtifactKind.report


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "weights").write_bytes(b"\0\1\2")
    return folder


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda folder: os.utime(folder / "config.json", (1, 1)), True),
        (lambda folder: (folder / "config.json").chmod(0o600), True),
        (lambda folder: (folder / "inner" / "weights").write_bytes(b"\0\1\3"), False),
        (lambda folder: (folder / "config.json").rename(folder / "other.json"), False),
        (lambda folder: (folder / "more").write_text(""), False),
        (lambda folder: (folder / "inner" / "weights").rename(folder / "weights"), False),
    ],
)
def test_of_a_directory(model: Path, change, is_same: bool) -> None:
    before = Digests(model.parent).of(model, CHECKPOINT)
    change(model)
    assert (Digests(model.parent).of(model, CHECKPOINT) == before) is is_same


def test_a_file_is_read_again_only_where_it_has_changed(model: Path, monkeypatch) -> None:
    read: list[Path] = []
    plain = digest._plain
    monkeypatch.setattr(digest, "_plain", lambda path: (read.append(path), plain(path))[1])
    digests = Digests(model.parent)
    first = digests.of(model, CHECKPOINT)
    digests.save()
    assert len(read) == 2
    assert Digests(model.parent).of(model, CHECKPOINT) == first and len(read) == 2
    (model / "config.json").write_text("[]")
    assert Digests(model.parent).of(model, CHECKPOINT) != first
    assert [path.name for path in read[2:]] == ["config.json"]


def test_the_pipelines_own_directory_is_no_part_of_a_report(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        (root / "report.json").write_text(f'{{"model": "{root}/stages/base/hf"}}')
        found.append(Digests(root).of(root / "report.json", REPORT))
        found.append(Digests(root).of(root / "report.json", CHECKPOINT))
    assert found[0] == found[2] and found[1] != found[3]


def test_counts(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert digest.counts_of(rows) == {"rows": 2, "bytes": 19}
    assert digest.counts_of(model) == {"files": 2, "bytes": 5}
