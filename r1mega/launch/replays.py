"""`r1mega replay`: where to start from so that a recorded update can be done again, and what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from r1mega.config import io
from r1mega.config.choices import Loop
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import rundir


def plan(run_dir: Path, round_number: int, update: int) -> tuple[Config, str | None]:
    """The run's configuration and the newest whole checkpoint before the round; None: the run's own start.

    Raises ConfigError where the directory holds no RL run, or a round in between was not recorded.
    """
    path = rundir.latest_config(run_dir)
    if path is None:
        raise ConfigError([Fault("RUN_DIR", str(run_dir), "must hold a run (config.yaml)", "give a run's directory")])
    config = io.load(path)
    config.run.dir = str(run_dir)
    if config.stage.loop is not Loop.rl:
        raise ConfigError([Fault("RUN_DIR", str(run_dir), "must hold an RL run", "rounds are recorded in RL only")])
    # Only now: with these comes torch, which `--help` does without.
    from r1mega.loop import checkpoints, rounds

    try:
        store = checkpoints.open_store(config)
        before = [info for info in store.list() if info.facts["round"] < round_number]
        first = before[-1].facts["round"] + 1 if before else 1
        records = [rounds.read(run_dir, number) for number in range(first, round_number + 1)]
        if before:
            store.verify(before[-1].path)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    known = [entry.update for entry in records[-1].updates] if records else []
    if update not in known:
        constraint = f"must be an update of round {round_number}"
        raise ConfigError([Fault("update", str(update), constraint, f"choose from {known}")])
    return config, str(before[-1].path) if before else None


def show(found: dict) -> int:
    """Print the comparison, for people on stderr and as one JSON line on stdout; 0 where identical, else 1."""
    print(f"round {found['round']}, update {found['update']}", file=sys.stderr)
    for name in ("loss", "grad_norm", "digest"):
        recorded, replayed = found["recorded"][name], found["replayed"][name]
        verdict = "identical" if recorded == replayed else "DIFFERS"
        print(f"  {name:<10} recorded {recorded}  replayed {replayed}  {verdict}", file=sys.stderr)
    print(json.dumps(found))
    return 0 if found["identical"] else 1
