"""Requests that cannot be met, places that cannot be written and disks that fill: what the message says, what stays."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.conversion import config_files, plan, run, worker
from r1mega.conversion.run import ConversionError

REPO = Path(__file__).resolve().parents[3]
SCALE = "model.layers.0.mlp.down_proj.weight_scale_inv"
MEGATRON = {"to": "megatron", "dtype": None}
FULL = "No space left on device"


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, FULL)


class Disk(io.FileIO):
    """A file on a disk with so many bytes left that takes no more than some thousand in one write."""

    left = 0
    at_once = 5000

    def write(self, data: Any) -> int:
        if not Disk.left:
            no_space()
        done = super().write(memoryview(data)[: min(Disk.left, Disk.at_once)])
        Disk.left -= done
        return done


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> type[Disk]:
    """Where workers write distributed checkpoints; `Disk.left` says how much."""
    monkeypatch.setattr(worker, "open", lambda path, mode, buffering: Disk(path, mode), raising=False)
    return Disk


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "names", "remedy"),
    [
        ("vocab_size=7", "--set vocab_size=7: got 'vocab_size'", "must be one of max_position_embeddings"),
        ("nonsense", "--set nonsense", "other fields follow from the weights"),
        ("rope_theta=high", "--set rope_theta=high: got 'high'", "must be a finite float in JSON, 1 or more"),
        ("rope_theta=Infinity", "--set rope_theta=Infinity: got 'Infinity'", "must be a finite float"),
        ("max_position_embeddings=0", "--set max_position_embeddings=0: got '0'", "must be a finite int in JSON"),
        ("max_position_embeddings=1.5", "--set max_position_embeddings=1.5: got '1.5'", "must be a finite int"),
        ("bos_token_id=-1", "--set bos_token_id=-1: got '-1'", "must be a finite int in JSON, 0 or more"),
        ("tie_word_embeddings=1", "--set tie_word_embeddings=1: got '1'", "must be true or false"),
    ],
)
def test_fields_that_cannot_be_set(text: str, names: str, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        config_files.parse_edits([text])
    assert names in str(caught.value) and remedy in str(caught.value)


def test_two_tables_cannot_be_tied(bench: Any) -> None:
    changes = {"tie_word_embeddings": True}
    bench.refused(bench.copy("v3"), ("--set tie_word_embeddings=true", "leave it so"), changes=changes)


def test_no_workers(bench: Any) -> None:
    bench.refused(bench.copy("v3"), ("--workers 0", "must be at least 1"), workers=0)


@pytest.mark.parametrize(
    ("content", "names", "remedy"),
    [
        ("{", "not a tokenizer", "restore it, or name another with --tokenizer"),
        ("[]", "not a tokenizer", "restore it"),
        ('{"model": {}}', "not a tokenizer", "restore it"),
        ('{"model": {"vocab": {"a": "0"}}}', "not a tokenizer", "restore it"),
        ('{"model": {"vocab": {"a": 0, "b": 323}}}', "its largest id is 323", "name the model's own tokenizer"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 999}]}', "its largest id is 999", "--tokenizer"),
        (None, "Is a directory", "restore it"),
    ],
)
def test_a_tokenizer_that_is_damaged_or_of_another_model(
    content: str | None, names: str, remedy: str, bench: Any
) -> None:
    source = bench.copy("v3")
    path = source / "tokenizer.json"
    path.mkdir() if content is None else path.write_text(content)
    bench.refused(source, (str(path), names, remedy))
    assert not bench.partial.exists()


def test_a_tokenizer_that_is_nowhere(bench: Any) -> None:
    folder = bench.folder / "nowhere"
    bench.refused(bench.copy("v3"), (f"--tokenizer {folder}", "tokenizer.json", "name another"), tokenizer=folder)


@dataclass(frozen=True)
class Place:
    """Something that stands where the output or its unfinished form is to go."""

    name: str
    out: str
    names: str
    remedy: str
    folder: str = ""
    file: str = ""


@pytest.mark.parametrize(
    "place",
    [
        Place("out exists", "out", "out: exists", "choose another or move it away", folder="out"),
        Place("out is a file", "out", "out: exists", "choose another or move it away", file="out"),
        Place("out in source", "source-v3/out", "must stand outside the source", "choose another"),
        Place("source in out", "", "exists", "choose another"),
        Place("parent is a file", "file/deep/out", "file/deep/out.partial", "mend the path", file="file"),
        Place("name too long", "x" * 250, "File name too long", "mend the path"),
        Place("partial is a file", "out", "out.partial", "mend the path", file="out.partial"),
        Place("partial of a stranger", "out", "out.partial: holds files", "delete it or", file="out.partial/thesis"),
    ],
    ids=lambda place: place.name,
)
def test_a_place_that_is_taken_or_cannot_be_written(place: Place, bench: Any) -> None:
    source = bench.copy("v3")
    if place.folder:
        (bench.folder / place.folder).mkdir(parents=True)
    if place.file:
        (bench.folder / place.file).parent.mkdir(parents=True, exist_ok=True)
        (bench.folder / place.file).write_text("mine")
    bench.refused(source, (place.names, place.remedy), out=bench.folder / place.out)
    assert not place.file or (bench.folder / place.file).read_text() == "mine"
    bench.convert(source, out=bench.folder / "elsewhere")  # the source is as it was


def test_out_may_be_a_link_that_leads_nowhere(bench: Any) -> None:
    bench.out.symlink_to(bench.folder / "nowhere")
    bench.refused(bench.copy("v3"), ("out: exists", "choose another or move it away"))


def test_the_source_is_not_taken_for_an_unfinished_output(bench: Any) -> None:
    source = bench.copy("v3").rename(bench.partial)
    before = tensors_of(source)
    bench.refused(source, (str(bench.partial), "must stand outside the source", "choose another"))
    after = tensors_of(source)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_another_conversion_is_writing(bench: Any) -> None:
    progress = bench.partial / ".progress"
    progress.mkdir(parents=True)
    with open(progress / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = (f"{bench.partial}: another conversion is writing here", "wait for it or choose another --out")
        bench.refused(bench.copy("v3"), words)


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"changes": {"rope_theta": 5.0}}, {"other": True}])
def test_the_unfinished_output_of_other_work(
    options: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bench.copy("v3")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        bench.refused(source, (FULL, "make room"))
    if options.pop("other", False):
        source = bench.copy("sharded")
    words = (f"{bench.partial}: was begun from another source", "delete it to begin anew, or choose another --out")
    bench.refused(source, words, **options)


def test_a_disk_known_to_be_too_small(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    bench.refused(bench.copy("v3"), ("--out:", "1,000 bytes free", "make room or choose another disk"))


@pytest.mark.parametrize("left", [0, 700, 20_000, 250_000])
def test_a_disk_that_fills_under_a_distributed_checkpoint(left: int, bench: Any, disk: type[Disk]) -> None:
    """The same command goes on once there is room, also where one write takes only a part of the bytes."""
    source = bench.copy("v3")
    disk.left = left
    error = bench.refused(source, ("__0_0.distcp: " + FULL, "make room or mend the path", "run the same"), **MEGATRON)
    assert isinstance(error, ConversionError)
    disk.left = 1 << 30
    bench.convert(source, **MEGATRON)
    bench.convert(bench.out.rename(bench.folder / "megatron"), out=bench.folder / "again")
    before, after = tensors_of(source), tensors_of(bench.folder / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("function", ["pwrite", "ftruncate"])
def test_a_disk_that_fills_under_safetensors(function: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.copy("v3")
    with monkeypatch.context() as patch:
        if function == "pwrite":
            patch.setattr(os, "pwrite", no_space)
        else:
            patch.setattr(run, "open", lambda *_, **__: no_space(), raising=False)
        bench.refused(source, ("out.partial", FULL, "make room or mend the path"))
    bench.convert(source)
    assert tensors_of(bench.out).keys() == tensors_of(source).keys()


@pytest.mark.parametrize("to", [{"to": "hf"}, MEGATRON], ids=["hf", "megatron"])
@pytest.mark.parametrize("file", ["fingerprint.tmp", "part-00000.tmp", "config.json", "conversion.json"])
def test_a_disk_that_fills_under_a_small_file(
    file: str, to: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is left cut short; the same command goes on once there is room."""
    source, write_text = bench.copy("v3"), Path.write_text

    def write(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == file:
            path.touch()
            no_space()
        return write_text(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        bench.refused(source, ("out.partial", FULL, "make room or mend the path"), **to)
    bench.convert(source, **to)
    assert json.loads((bench.out / "conversion.json").read_text())["format"] == 1


def test_out_appears_while_it_is_made(bench: Any) -> None:
    source = bench.copy("v3")

    def progress(done: int, total: int) -> None:
        bench.out.mkdir(exist_ok=True)

    with pytest.raises(ConversionError, match="out: appeared while .*out.partial was written; move it away"):
        bench.convert(source, progress)
    assert list(bench.out.iterdir()) == []
    bench.out.rmdir()
    assert bench.convert(source).kept_parts == 1


def test_a_worker_is_killed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(part: plan.Part) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(run, "_run_part", killed)
    bench.refused(bench.copy("v3"), (f"{bench.partial} keeps what is done", "run the same command with --workers"))


def test_damage_to_what_was_done_before_is_made_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.copy("v3")
    monkeypatch.setattr(run.proof, "write", no_space)
    bench.refused(source, (FULL, "make room"), **MEGATRON)
    boxes = bench.partial / "model/__0_0.distcp"
    content = boxes.read_bytes()
    for damaged in (bytes(len(content)), content[:1000] + b"x" + content[1001:], content[:-7], b""):
        boxes.write_bytes(damaged)
        bench.refused(source, (FULL, "make room"), **MEGATRON)
        assert boxes.read_bytes() == content
    written = boxes.stat().st_mtime_ns
    bench.refused(source, (FULL, "make room"), **MEGATRON)
    assert boxes.stat().st_mtime_ns == written  # not again where nothing is damaged


def command_line(source: Path, *arguments: str, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """tools/convert_checkpoint.py in a process that may write files of so many bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    program = [sys.executable, str(REPO / "tools/convert_checkpoint.py"), arguments[0], "--hf", str(source)]
    return subprocess.run(
        [*program, *arguments[1:], "--out", str(source.parent / "out"), "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=limit if file_bytes else None,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    assert done.stdout == "" and done.stderr.startswith("convert_checkpoint: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_the_command_line_refuses_before_it_begins(bench: Any) -> None:
    source = bench.copy("sharded")
    (source / "model-00002-of-00003.safetensors").unlink()
    done = command_line(source, "hf-to-megatron")
    assert done.returncode == 2
    assert "model-00002-of-00003.safetensors" in said(done) and "download the missing shard" in done.stderr
    assert not bench.out.exists() and not bench.partial.exists()


def test_the_command_line_fails_on_the_way(bench: Any) -> None:
    source = bench.copy("fp8")
    found = load_file(source / "model.safetensors")
    found[SCALE].fill_(torch.nan)
    save_file(found, source / "model.safetensors")
    done = command_line(source, "hf-to-hf", "--dtype", "bf16")
    assert done.returncode == 1
    assert f"{SCALE.removesuffix('_scale_inv')}: a scale is NaN" in said(done) and "restore it" in done.stderr
    assert not bench.out.exists()


@pytest.mark.parametrize("command", ["hf-to-megatron", "hf-to-hf --dtype fp8"])
def test_the_command_line_on_a_full_disk(command: str, bench: Any) -> None:
    done = command_line(bench.copy("v3"), *command.split(), file_bytes=100_000)
    assert done.returncode == 1
    assert "File too large" in said(done) and "out.partial" in done.stderr and "make room" in done.stderr
    assert not bench.out.exists()
