"""Conversions inside the test's own process, and checkpoints to convert."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.conversion import plan, run
from r1mega.conversion.run import Outcome, Request, convert


class Killed(BaseException):
    """What a signal would do: nothing catches it."""


class Executor:
    """Does what is submitted at once, until as many parts are made as it has to live for."""

    def __init__(
        self, owner: Inline, workers: int, *, mp_context: Any, initializer: Any, initargs: tuple[Any, ...]
    ) -> None:
        self._owner = owner
        owner.workers.append(workers)
        initializer(*initargs)

    def submit(self, function: Any, part: Any) -> Future[bool]:
        if len(self._owner.made) == self._owner.parts_to_live:
            raise Killed
        future: Future[bool] = Future()
        try:
            was_there = function(part)
            if not was_there:
                self._owner.made.append(part.index)
            future.set_result(was_there)
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        """Nothing is left to wait for."""


class Inline:
    """`convert(command, source, out, ...)` as the program does it, in this process.

    `made` are the parts that were made since `die_after`, in order; `workers` the number asked for by each conversion.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.made: list[int] = []
        self.workers: list[int] = []
        self.parts_to_live: int | None = None
        monkeypatch.setattr(run, "ProcessPoolExecutor", partial(Executor, self))
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def limits(self, *, part: int, file: int | None = None) -> None:
        """Bytes of one part and of one safetensors file."""
        self._monkeypatch.setattr(plan, "PART_BYTES", part)
        if file is not None:
            self._monkeypatch.setitem(plan.plan_hf.__kwdefaults__, "file_bytes", file)

    def die_after(self, parts: int | None) -> None:
        """Be killed once so many parts more are made; None: live."""
        self.made.clear()
        self.parts_to_live = parts

    def __call__(self, command: str, source: Path, out: Path, **options: Any) -> Outcome:
        kind, _, to = command.partition("-to-")
        return convert(Request(source, kind, out, to, **options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weights, as the safetensors library reads them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    found = {file: load_file(folder / file) for file in sorted(set(where.values()))}
    assert {name: file for file, held in found.items() for name in held} == where
    return {name: tensor for held in found.values() for name, tensor in held.items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert differing(ours[name], theirs[name]) == 0, name


def differing(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Bytes that differ."""
    return int((ours.contiguous().view(torch.uint8) != theirs.contiguous().view(torch.uint8)).sum())


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a checkpoint in one file, whose tensors `change` has changed in place."""
    shutil.copytree(folder, out)
    tensors = weights(out)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_fp32_gates(tensors: dict[str, torch.Tensor]) -> None:
    """Gate biases in fp32, none of them a bf16 number, as DeepSeek publishes them."""
    for seed, name in enumerate(sorted(tensors)):
        if name.endswith("e_score_correction_bias"):
            generator = torch.Generator().manual_seed(seed)
            bias = torch.randn(tensors[name].shape, generator=generator) / 100 + 2.0**-20
            assert bool((bias.bfloat16().float() != bias).all())
            tensors[name] = bias


def with_arbitrary_scales(tensors: dict[str, torch.Tensor]) -> None:
    """FP8 blocks as another program might have made them: scales of full fp32, some blocks far from 448."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        if name.endswith("_scale_inv"):
            values = tensors[name.removesuffix("_scale_inv")]
            tensors[name] *= 0.5 + torch.rand(tensors[name].shape, generator=generator)
            codes = values.view(torch.uint8)
            codes[:128][codes[:128] & 0x7F > 0x70] = 0x70  # 128 at most
            codes[-1, -1] = 0x80  # a negative zero
