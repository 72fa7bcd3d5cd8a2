"""A conversion that was killed, at whatever moment, goes on when it is asked for again and ends the same to the bit."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1mega.conversion import config_files, dist_metadata, proof, run
from r1mega.conversion.run import ConversionError
from r1mega.models import hf_fields
from r1mega.models.tables import slots_of

from .inline import Inline, Killed, files

REPO = Path(run.__file__).resolve().parents[2]
COMMANDS = ["hf-to-hf", "hf-to-megatron"]
PART, FILE = 40_000, 150_000


def options(command: str) -> dict[str, str]:
    return {"dtype": "fp8"} if command == "hf-to-hf" else {}


@pytest.fixture
def inline(monkeypatch):
    made = Inline(monkeypatch)
    made.limits(part=PART, file=FILE)
    return made


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("deepseek_v3", dtype="bfloat16", mtp=True)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The files of each command's output where nothing went wrong."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    with pytest.MonkeyPatch.context() as patch:
        inline = Inline(patch)
        inline.limits(part=PART, file=FILE)
        for command in COMMANDS:
            inline(command, source, folder / command, **options(command))
            found[command] = files(folder / command)
    return found


def kill(inline, command, source, out, parts):
    """Begin a conversion and let it be killed after so many parts."""
    inline.die_after(parts)
    with pytest.raises(Killed):
        inline(command, source, out, **options(command))
    assert not out.exists()
    inline.die_after(None)
    return out.with_name(out.name + ".partial")


def finish(inline, command, source, out, undisturbed, **others):
    outcome = inline(command, source, out, **options(command), **others)
    assert files(out) == undisturbed[command]
    assert not out.with_name(out.name + ".partial").exists()
    assert outcome.parts - outcome.kept_parts == len(inline.made)
    return outcome


def entries(partial: Path, part: int) -> list[dict]:
    works = json.loads((partial / ".progress" / f"part-{part:05d}.json").read_text())
    return [entry for work in works for entry in work["to"]]


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("parts", [0, 1, 5])
def test_killed_between_parts(inline, source, undisturbed, tmp_path, command, parts):
    kill(inline, command, source, tmp_path / "out", parts)
    outcome = finish(inline, command, source, tmp_path / "out", undisturbed, workers=3)
    assert outcome.kept_parts == parts
    assert outcome.parts > 8
    assert sorted(inline.made) == list(range(parts, outcome.parts))


def test_killed_again_and_again(inline, source, undisturbed, tmp_path):
    for _ in range(3):
        kill(inline, "hf-to-megatron", source, tmp_path / "out", 2)
    assert finish(inline, "hf-to-megatron", source, tmp_path / "out", undisturbed).kept_parts == 6


STEPS = [(proof, "check"), (config_files, "write"), (proof, "write"), (Path, "rename")]


@pytest.mark.parametrize(
    ("command", "step"),
    [("hf-to-megatron", (dist_metadata, "write")), *((command, step) for command in COMMANDS for step in STEPS)],
    ids=lambda value: value if isinstance(value, str) else f"{value[0].__name__}.{value[1]}",
)
@pytest.mark.parametrize("moment", ["before", "after", "failed"])
def test_stopped_when_all_parts_are_made(monkeypatch, inline, source, undisturbed, tmp_path, command, step, moment):
    """Killed before or after a step of the end, or the disk is full in it."""
    module, name = step
    real = getattr(module, name)

    def stopped(*args, **kwargs):
        if moment == "failed":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")
        if moment == "after":
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopped)
        error, text = (ConversionError, "No space left") if moment == "failed" else (Killed, None)
        with pytest.raises(error, match=text):
            inline(command, source, tmp_path / "out", **options(command))
    inline.die_after(None)
    if (name, moment) == ("rename", "after"):  # it stands where it belongs, and only its records were to be deleted
        found = {file: content for file, content in files(tmp_path / "out").items() if not file.startswith(".progress")}
        assert found == undisturbed[command]
        return
    assert not (tmp_path / "out").exists()
    outcome = finish(inline, command, source, tmp_path / "out", undisturbed)
    assert outcome.kept_parts == outcome.parts


@pytest.mark.parametrize("file", ["fingerprint", "part-00003"])
def test_killed_while_it_writes_down_what_is_done(monkeypatch, inline, source, undisturbed, tmp_path, file):
    real = Path.write_text

    def stopped(path, text, **kwargs):
        if path.name.startswith(file):
            real(path, text[: len(text) // 2], **kwargs)
            raise Killed
        return real(path, text, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stopped)
        with pytest.raises(Killed):
            inline("hf-to-hf", source, tmp_path / "out", dtype="fp8")
    inline.die_after(None)
    outcome = finish(inline, "hf-to-hf", source, tmp_path / "out", undisturbed)
    assert outcome.kept_parts == (3 if file == "part-00003" else 0)


def place_in(partial: Path, entry: dict, what: str) -> int:
    """The position in its file of a byte of a recorded tensor, or of the pickle around it."""
    at, raw = entry["at"], (partial / entry["file"]).read_bytes()[entry["at"] :][: entry["nbytes"]]
    if what == "pickle":
        return at + raw.index(b"torch._utils")
    content = raw
    if "key" in entry:  # a zip archive
        content = torch.load(io.BytesIO(raw)).view(-1).view(torch.uint8).numpy().tobytes()
    return at + raw.index(content) + len(content) // 2


@pytest.mark.parametrize("part", [0, 2, 4])
@pytest.mark.parametrize(
    ("command", "what"), [("hf-to-hf", "tensor"), ("hf-to-megatron", "tensor"), ("hf-to-megatron", "pickle")]
)
def test_a_part_damaged_between_the_runs_is_made_again(inline, source, undisturbed, tmp_path, part, command, what):
    partial = kill(inline, command, source, tmp_path / "out", 5)
    found = entries(partial, part)
    damaged = found[len(found) // 2]
    flip(partial / damaged["file"], place_in(partial, damaged, what))
    outcome = finish(inline, command, source, tmp_path / "out", undisturbed)
    assert outcome.kept_parts == 4
    assert inline.made == [part, *range(5, outcome.parts)]


DAMAGES = ["truncated", "deleted", "no-record", "torn-record", "odd-record"]


@pytest.mark.parametrize(
    ("command", "damage"), [("hf-to-hf", "head"), *((command, damage) for command in COMMANDS for damage in DAMAGES)]
)
def test_what_else_may_be_damaged_between_the_runs(inline, source, undisturbed, tmp_path, command, damage):
    partial = kill(inline, command, source, tmp_path / "out", 5)
    file = partial / entries(partial, 0)[0]["file"]
    record = partial / ".progress" / "part-00001.json"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "deleted":
        file.unlink()
    elif damage == "head":
        flip(file, 20)  # no part writes there
    elif damage == "no-record":
        record.unlink()
    elif damage == "torn-record":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text('[{"from": {}, "to": [{"name": "a"}]}]')
    outcome = finish(inline, command, source, tmp_path / "out", undisturbed)
    assert outcome.kept_parts == 5 if damage == "head" else outcome.kept_parts < 5


def test_other_work_does_not_continue_it(inline, source, undisturbed, tmp_path):
    partial = kill(inline, "hf-to-hf", source, tmp_path / "out", 5)
    before = files(partial)
    with pytest.raises(ValueError, match=r"out\.partial: was begun from another source, by other options"):
        inline("hf-to-hf", source, tmp_path / "out", dtype="bf16")
    with pytest.raises(ValueError, match="was begun from another source"):
        inline("hf-to-hf", source, tmp_path / "out", dtype="fp8", changes={"max_position_embeddings": 7})
    copy = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    with pytest.raises(ValueError, match="was begun from another source"):
        inline("hf-to-hf", copy, tmp_path / "out", dtype="fp8")
    with open(partial / ".progress" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"out\.partial: another conversion is writing here"):
            inline("hf-to-hf", source, tmp_path / "out", dtype="fp8")
    assert files(partial) == before
    assert inline.made == []
    finish(inline, "hf-to-hf", source, tmp_path / "out", undisturbed)


def test_a_source_that_changed_meanwhile_is_refused(inline, source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    kill(inline, "hf-to-hf", copy, tmp_path / "out", 5)
    os.utime(copy / "model.safetensors", ns=(0, 0))
    with pytest.raises(ValueError, match="was begun from another source"):
        inline("hf-to-hf", copy, tmp_path / "out", dtype="fp8")


def test_former_scales_are_a_part_of_the_source(inline, source, tmp_path):
    """A conversion to FP8 takes them: other ones are other work, and the record names their file."""
    inline("hf-to-hf", source, tmp_path / "fp8", dtype="fp8")
    inline("hf-to-hf", tmp_path / "fp8", tmp_path / "bf16", dtype="bf16")
    kill(inline, "hf-to-hf", tmp_path / "bf16", tmp_path / "out", 5)
    scales = tmp_path / "bf16" / "fp8_scales.safetensors"
    kept = scales.stat()
    scales.rename(tmp_path / "scales")
    with pytest.raises(ValueError, match="was begun from another source"):
        inline("hf-to-hf", tmp_path / "bf16", tmp_path / "out", dtype="fp8")
    (tmp_path / "scales").rename(scales)
    inline("hf-to-hf", tmp_path / "bf16", tmp_path / "out", dtype="fp8")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["files"][scales.name] == kept.st_size


DRIVER = """
import sys, time
from r1mega.conversion import plan, worker
import convert_checkpoint

plan.PART_BYTES = 1 << 20
real = worker.Worker.run

def slowly(self, part):
    time.sleep(0.03)
    real(self, part)

worker.Worker.run = slowly
if __name__ == "__main__":
    sys.exit(convert_checkpoint.main())
"""


def write_large(path: Path) -> Path:
    """A llama checkpoint of 100 MB."""
    shape = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    rest = {"model_type": "llama", "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": False}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape | heads | rest))
    names = {tensor.name: tensor.shape for slot in slots_of(hf_fields.read(path)) for tensor in slot.tensors}
    tensors = {name: torch.randint(-(2**15), 2**15, size, dtype=torch.int16) for name, size in names.items()}
    for tensor in tensors.values():
        tensor &= ~0x4000  # no NaN, no infinity
    save_file({name: tensor.view(torch.bfloat16) for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def test_a_real_kill_at_a_random_moment(inline, tmp_path):
    """SIGKILL to the program and its workers; what is done by then is kept, and the end is as if undisturbed."""
    hf, out, script = write_large(tmp_path / "hf"), tmp_path / "out", tmp_path / "driver.py"
    assert 80e6 < (hf / "model.safetensors").stat().st_size < 160e6
    script.write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, script, "hf-to-megatron", "--hf", hf, "--out", out, "--workers", "2"],
        env=os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tools'}", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        partial, moment = tmp_path / "out.partial", random.uniform(0.0, 0.3)
        while not any(partial.glob(".progress/part-*.json")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(moment)
        assert process.poll() is None, f"done within {moment} s: {process.communicate()[0]}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    inline.limits(part=1 << 20)
    outcome = inline("hf-to-megatron", hf, out, workers=2)
    assert 0 < outcome.kept_parts < outcome.parts, f"killed {moment} s after the first part"
    assert len(inline.made) == outcome.parts - outcome.kept_parts
    inline("hf-to-megatron", hf, tmp_path / "undisturbed")
    ours, theirs = files(out), files(tmp_path / "undisturbed")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    for folder in (hf, out, tmp_path / "undisturbed"):
        shutil.rmtree(folder)  # pytest keeps what tests leave
