"""Saving a run and going on with it: what of a run lies in a checkpoint, and who writes which part.

update-000012/model/         weights, optimizer, reference (Megatron's distributed checkpoint, any layout loads it)
update-000012/rng/           the random states of each rank, for the same layout alone
update-000012/config.json    the model's, with its tokenizer: the directory is a source of weights by itself
update-000012/state.json     clocks, data cursor, where the logs stood, layout, digest of what decides the run
update-000012/pending.safetensors  groups that were asked for and not trained on, where there are any (loop.rounds)
update-000012/manifest.json  every file with its digest; written last (train.checkpoint_store)
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from r1mega.config.decisive import digest
from r1mega.config.schema import Config
from r1mega.conversion import config_files
from r1mega.loop import stop
from r1mega.loop.rounds import read_groups, write_groups
from r1mega.loop.state import RunState
from r1mega.parallel.collectives import share
from r1mega.parallel.groups import Groups
from r1mega.train.checkpoint_store import CheckpointStore
from r1mega.types import SampleGroup

if TYPE_CHECKING:
    from r1mega.train.policy import MegatronPolicy

FOLDER, STATE_FILE, PENDING_FILE = "checkpoints", "state.json", "pending.safetensors"


class Cursor(Protocol):
    """A data source that can be resumed."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""


class Log(Protocol):
    """What the logs are asked."""

    def position(self) -> dict[str, int]:
        """File name -> bytes written so far, with nothing held back."""

    def latest(self) -> dict[str, float]:
        """The last value of each metric."""


def open_store(config: Config) -> CheckpointStore:
    """The store of the run's checkpoints."""
    settings = config.checkpoint
    return CheckpointStore(
        Path(config.run.dir) / FOLDER,
        settings.keep_newest,
        settings.keep_best,
        settings.best_metric if settings.keep_best else "",
    )


class Checkpoints:
    """Takes checkpoints of a run where they are due. Every rank has one; rank 0 moves the files."""

    def __init__(self, config: Config, groups: Groups, policy: MegatronPolicy) -> None:
        self._config, self._groups, self._policy = config, groups, policy
        self._store = open_store(config)
        self._asked: str | None = None
        self._queue = None
        if config.checkpoint.asynchronous:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()

    def is_due(self, state: RunState) -> bool:
        """Whether `checkpoint.every` updates have passed since the last one, or the run is asked to stop. Collective.

        A run that was asked to stop has ended when `save` returns.
        """
        asked = stop.asked(self._config.run.dir) if self._groups.rank == 0 else None
        self._asked = share(asked, self._groups.control)
        every = self._config.checkpoint.every
        return self._asked is not None or (every > 0 and state.update // every > state.saved_at // every)

    def save(self, state: RunState, cursor: dict[str, Any], log: Log, pending: Sequence[SampleGroup] = ()) -> None:
        """Write a checkpoint; asynchronous, begin to. Collective.

        `cursor` is where the data source stands, and `pending` what was asked of the engines since and not trained on;
        rank 0's are written. Raises Stopped, with the checkpoint written, where the run is asked to stop.
        """
        self._write(state, cursor, log, pending)
        if self._asked is not None:
            self.finish()
            raise stop.Stopped(self._asked)

    def _write(self, state: RunState, cursor: dict[str, Any], log: Log, pending: Sequence[SampleGroup]) -> None:
        self.finish()
        state.saved_at = state.update
        control, rank = self._groups.control, self._groups.rank
        path = Path(share(self._begin(state, cursor, log, pending) if rank == 0 else None, control))
        torch.save(_random_states(), path / "rng" / f"rank-{rank:05d}.pt")
        with _watched(self._config.run.timeout_minutes):
            request = self._policy.save(path / "model", asynchronous=self._queue is not None)
        update, facts = state.update, self._facts(state, log)
        if self._queue is None or request is None:
            self._commit(update, facts)
            return
        request.add_finalize_fn(lambda: self._commit(update, facts))
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Finish an asynchronous checkpoint whose files are written. Collective."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous checkpoint. Collective."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _begin(self, state: RunState, cursor: dict[str, Any], log: Log, pending: Sequence[SampleGroup]) -> str:
        path = self._store.begin(state.update)
        for name in ("model", "rng"):
            (path / name).mkdir()
        content = {
            "state": state.state_dict(),
            "data": cursor,
            "log": log.position(),
            "layout": str(self._groups.layout),
            "config": digest(self._config),
            "pending": [group.prompt.id for group in pending],
        }
        if pending:
            write_groups(path / PENDING_FILE, pending, {})
        model = self._config.model
        config_files.keep(path, self._policy.fields, Path(model.tokenizer or model.hf))
        (path / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return str(path)

    def _facts(self, state: RunState, log: Log) -> dict[str, Any]:
        return {
            "round": state.round,
            "layout": str(self._groups.layout),
            "metrics": log.latest() if self._groups.rank == 0 else {},
        }

    def _commit(self, update: int, facts: dict[str, Any]) -> None:
        # Every rank has closed its files before rank 0 digests them, and none goes on before they are safe.
        dist.barrier(group=self._groups.control)
        if self._groups.rank == 0:
            self._store.commit(update, facts)
        dist.barrier(group=self._groups.control)


@contextmanager
def _watched(minutes: float) -> Iterator[None]:
    """End this process, with a traceback in its log, when the block takes longer.

    Megatron's writers are processes of their own, and where one of them dies it waits for ever.
    """
    faulthandler.dump_traceback_later(60 * minutes, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def restore(
    config: Config,
    groups: Groups,
    policy: MegatronPolicy,
    state: RunState,
    data: Cursor | None,
    copies: tuple[str, ...],
) -> None:
    """Put policy, clocks, data cursor and random states back as `config.run.resume_from` has them. Collective."""
    path = Path(config.run.resume_from)
    policy.restore(path / "model", copies)
    saved = read_state(path)
    state.load_state_dict(saved["state"])
    if data is not None:
        data.load_state_dict(saved["data"])
    if saved["layout"] == str(groups.layout):
        _set_random_states(torch.load(path / "rng" / f"rank-{groups.rank:05d}.pt"))


def read_pending(path: Path, *, with_experts: bool = False) -> list[SampleGroup]:
    """The groups that a checkpoint's run had asked for and not trained on, without texts. Raises ValueError where they
    cannot be read, or lack the experts asked for."""
    return read_groups(path / PENDING_FILE, with_experts=with_experts)[0] if read_state(path)["pending"] else []


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))


def _random_states() -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        states |= {"cuda": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        torch.cuda.set_rng_state(states["cuda"])
        get_cuda_rng_tracker().set_states(states["tracker"])
