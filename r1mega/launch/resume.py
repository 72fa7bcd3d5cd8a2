"""Going on with a run: which checkpoint, whether it is whole, whether the configuration still means the same run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from r1mega.config import io
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config, Loop, Schedule, Verify
from r1mega.launch import rundir

# Sections and fields that decide what is computed. All others (layout, logs, checkpoints ...) may differ on resuming.
_DECISIVE = ("stage", "model", "precision", "reward", "algo", "sft", "optim")
_DECISIVE_FIELDS = {
    "run": ("seed",),
    "data": ("train", "format", "question_key", "answer_key", "template", "max_prompt_tokens", "shuffle"),
    "rollout": ("temperature", "top_p", "max_tokens", "stop"),
}


def prepare(config: Config) -> None:
    """Find and check the checkpoint that `config.run` asks for, and cut the logs back to it.

    Sets `config.run.resume_from`; leaves it None where the run has not come to its first checkpoint, which then starts
    from the beginning. Raises ConfigError, before anything is changed, for a damaged or foreign checkpoint.
    """
    run = config.run
    started = rundir.latest_config(run.dir)
    if not (run.resume or run.resume_from) or (started is None and run.resume_from is None):
        return
    if started is not None and not run.allow_changes:
        _require_same(io.load(started), config)
    # Only now: with torch comes what only a resumed run needs so early.
    from r1mega.loop import checkpoints, rounds, runlog

    store = checkpoints.open_store(config)
    try:
        path = Path(run.resume_from) if run.resume_from else store.latest()
        if path is not None:
            store.verify(path, quick=config.checkpoint.verify is Verify.quick)
        saved = checkpoints.read_state(path) if path is not None else {"log": {}, "state": {"round": 0}}
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    run.resume_from = None if path is None else str(path)
    if started is not None:
        runlog.rewind(run.dir, saved["log"])
        rounds.rewind(run.dir, saved["state"]["round"])


def _require_same(before: Config, now: Config) -> None:
    """Raises ConfigError naming every decisive field that differs."""
    names = {section: tuple(f.name for f in fields(getattr(now, section))) for section in _DECISIVE}
    faults = []
    for section, listed in (names | _DECISIVE_FIELDS).items():
        for name in listed:
            old, new = (getattr(getattr(config, section), name) for config in (before, now))
            if old != new and not _may_grow(now, section, name):
                constraint = f"the run was started with {old}"
                remedy = "set it back, start a new run, or set run.allow_changes=true"
                faults.append(Fault(f"{section}.{name}", str(new), constraint, remedy))
    if faults:
        raise ConfigError(faults)


def _may_grow(now: Config, section: str, name: str) -> bool:
    """A run may be made longer where its learning rate does not depend on its length."""
    mine = "sft" if now.stage.loop is Loop.sft else "algo"
    return name == "updates" and (section != mine or now.optim.schedule is Schedule.constant)
