"""Going on with a run: which checkpoint, whether it is whole, whether the configuration still means the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import io
from r1mega.config.choices import SAMPLING_LOOPS, Verify
from r1mega.config.decisive import decisive, digest
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import rundir


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from (None: the beginning), its state, and whether run.dir holds logs to cut back."""

    path: Path | None
    saved: dict[str, Any]
    has_logs: bool


def prepare(config: Config) -> None:
    """Find and check the checkpoint that `config.run` asks for, and cut the logs back to it.

    Sets `config.run.resume_from`; leaves it None where the run has not come to its first checkpoint, which then starts
    from the beginning. Raises ConfigError, before anything is changed, for a damaged or foreign checkpoint.
    """
    found = find(config)
    if found is None:
        return
    from r1mega.loop import rounds, runlog

    config.run.resume_from = None if found.path is None else str(found.path)
    if found.has_logs:
        runlog.rewind(config.run.dir, found.saved["log"])
        rounds.rewind(config.run.dir, found.saved["state"]["round"])


def find(config: Config) -> Found | None:
    """What `config.run` asks to go on from, checked; None where it asks for nothing. Changes nothing.

    Raises ConfigError for a damaged or foreign checkpoint, or settings that the run was not started with.
    """
    run = config.run
    started = rundir.latest_config(run.dir)
    if not (run.resume or run.resume_from) or (started is None and run.resume_from is None):
        return None
    if started is not None and not run.allow_changes:
        _require_same(io.load(started), config)
    if config.stage.loop in SAMPLING_LOOPS:  # they go on from their samples
        return None
    # Only now: with torch comes what only a resumed run needs so early.
    from r1mega.loop import checkpoints

    store = checkpoints.open_store(config)
    try:
        path = Path(run.resume_from) if run.resume_from else store.latest()
        if path is not None:
            store.verify(path, quick=config.checkpoint.verify is Verify.quick)
        saved = checkpoints.read_state(path) if path is not None else {"log": {}, "state": {"round": 0}}
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    if path is not None and saved["config"] != digest(config) and not run.allow_changes:
        constraint = "is of a run with other settings (its config.yaml says which)"
        raise ConfigError([Fault("run.resume_from", str(path), constraint, _REMEDY)])
    return Found(path, saved, started is not None)


def _require_same(before: Config, now: Config) -> None:
    """Raises ConfigError naming every decisive field that differs."""
    old, new = decisive(before), decisive(now)
    faults = [
        Fault(path, str(new[path]), f"the run was started with {old[path]}", _REMEDY)
        for path in new
        if path in old and new[path] != old[path]
    ]
    if faults:
        raise ConfigError(faults)


_REMEDY = "set it back, start a new run, or set run.allow_changes=true"
