"""Tiny checkpoints to damage, and conversions of them in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.tiny_checkpoints import write_checkpoint
from r1mega.conversion import run
from r1mega.conversion.run import ConversionError, Outcome, Request, convert


class Inline:
    """As much of a ProcessPoolExecutor as a conversion uses, without the processes."""

    def __init__(
        self, workers: int, mp_context: object, initializer: Callable[..., None], initargs: tuple[Any, ...]
    ) -> None:
        try:
            initializer(*initargs)
            self._error = None
        except Exception:
            self._error = BrokenProcessPool()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self._error:
                raise self._error
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        """Nothing is running."""


@contextmanager
def in_this_process() -> Iterator[None]:
    """Conversions run here; what a worker sets for its own process is put back."""
    threads, crc32 = torch.get_num_threads(), torch.serialization.get_crc32_options()
    with mock.patch.object(run, "ProcessPoolExecutor", Inline), mock.patch.object(run, "_worker", None):
        yield
    torch.set_num_threads(threads)
    torch.serialization.set_crc32_options(crc32)


class Bench:
    """Checkpoints by name: `v3` with a multi-token-prediction layer in bf16, the same in three files (`sharded`), in
    FP8 blocks (`fp8`), from those in bf16 again (`former_fp8`) and as Megatron's (`megatron`).
    """

    def __init__(self, checkpoints: Path, folder: Path) -> None:
        self._checkpoints = checkpoints
        self.folder = folder
        self.out = folder / "out"
        self.partial = folder / "out.partial"

    def copy(self, name: str) -> Path:
        """A copy to damage."""
        return Path(shutil.copytree(self._checkpoints / name, self.folder / f"source-{name}"))

    def request(self, source: Path, **options: Any) -> Request:
        """By default the conversion that reads and writes most: to bf16, whatever the source is."""
        kind = "megatron" if "megatron" in source.name else "hf"
        usual = {"source": source, "source_kind": kind, "out": self.out, "to": "hf", "dtype": "bf16"}
        return Request(**usual | options)

    def convert(self, source: Path, progress: Callable[[int, int], None] | None = None, **options: Any) -> Outcome:
        """Convert in this process."""
        request = self.request(source, **options)
        return convert(request, progress) if progress else convert(request)

    def refused(self, source: Path, words: tuple[str, ...], **options: Any) -> ValueError:
        """The error that the conversion ends in: its message has all the words, and nothing stands at OUT."""
        stood_before = os.path.lexists(options.get("out", self.out))
        with pytest.raises(ValueError) as caught:
            self.convert(source, **options)
        message = str(caught.value)
        assert [word for word in words if word not in message] == [], message
        assert "Traceback" not in message
        assert stood_before or not os.path.lexists(options.get("out", self.out))
        return caught.value

    def check(self, case: Any) -> None:
        """A case of a table: `of` a checkpoint, `damage` done to its copy, `names` and `remedy` in the message.

        A conversion that is refused before it begins leaves nothing at all.
        """
        source = self.copy(case.of)
        case.damage(source)
        error = self.refused(source, (case.names, case.remedy), **case.options)
        assert isinstance(error, ConversionError) == self.partial.exists() == case.is_late, str(error)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the checkpoints that `Bench` names."""
    folder = tmp_path_factory.mktemp("checkpoints")
    v3 = write_checkpoint(folder / "v3", "deepseek_v3", dtype="bfloat16", mtp=True, num_hidden_layers=2)
    shutil.copytree(v3, folder / "sharded")
    split(folder / "sharded", 3)
    with in_this_process():
        convert(Request(v3, "hf", folder / "fp8", "hf", "fp8"))
        convert(Request(folder / "fp8", "hf", folder / "former_fp8", "hf", "bf16"))
        convert(Request(folder / "fp8", "hf", folder / "megatron", "megatron"))
    return folder


@pytest.fixture
def bench(checkpoints: Path, tmp_path: Path) -> Iterator[Bench]:
    """A place for one conversion."""
    with in_this_process():
        yield Bench(checkpoints, tmp_path)


def split(checkpoint: Path, count: int) -> None:
    """Make several files with an index of a checkpoint's one file: tensor i goes into file i % count."""
    tensors = load_file(checkpoint / "model.safetensors")
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, checkpoint / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint / "model.safetensors").unlink()
