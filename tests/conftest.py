"""Tiny checkpoints of the three families, and the data samples that some tests look at when they are there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(REPO / "tools"))  # as for the programs there
from parity import tiny_checkpoints
from parity.nursery import Nursery


def write_checkpoint(path: Path, family: str, **options: Any) -> Path:
    """A random checkpoint with a tokenizer that reads any text; options as in tools/parity/tiny_checkpoints.py."""
    tiny_checkpoints.write_checkpoint(path, family, **options)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer():
    """A tokenizer that reads any text: one token a byte, beginning, end and padding after them. 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, **overrides)` -> the directory of a tiny checkpoint, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = family + json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


class InProcess:
    """Stands for a pool of processes: does at once, in this one, what it is given."""

    def __init__(self, max_workers: int = 1, *, mp_context=None, initializer=None, initargs=()) -> None:
        initializer(*initargs)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # handed to whoever asks for the result, as a pool does
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)

    def shutdown(self, **_options: Any) -> None:
        """Nothing: no process was started."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Nothing to end."""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """Conversions do without processes of their own, each of which would import torch first."""
    from r1mega.conversion import run, verify

    for module in (run, verify):
        monkeypatch.setattr(module, "ProcessPoolExecutor", InProcess)
    return InProcess


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts worlds of CPU processes without the seconds that imports take in each rank."""
    started = Nursery()
    yield started
    started.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real problems beside the repository; the test is skipped where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real problems are not at hand: {path.name}/ beside the repository is absent")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, where it is not asked for."""
    if not os.environ.get("R1MEGA_EXTENDED"):
        skip = pytest.mark.skip(reason="takes minutes: run with R1MEGA_EXTENDED=1")
        for item in items:
            if item.get_closest_marker("extended"):
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile`, but that tests which look at all that Slurm, or sandboxed programs, leave behind stay
    together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            folder = path.rpartition("/")[0]
            groups = {"tests/slurm": "slurm", "tests/unit/reward": "programs", "tests/unit/tools": "programs"}
            return groups.get(folder, path)

    return ByFileOrFolder(config, log)
