"""Doing an update of a past run again, without engines, and comparing what it gives with what the run recorded."""

from __future__ import annotations

import json
from pathlib import Path

from r1mega.config.schema import Config
from r1mega.loop import phases, rounds
from r1mega.loop.rounds import RoundRecord, UpdateRecord
from r1mega.loop.wire import REFERENCE, RlRun, wire_replay

ANSWER_FILE = "replay.json"


def main(config: Config, round_number: int, update: int, out: Path) -> None:
    """Replay one rank's part, from `config.run.resume_from` or from the start, up to `update` of the round.

    Rank 0 writes to `out` what was recorded and what came out. Raises ValueError where a round's record is missing.
    """
    with wire_replay(config) as run:
        found = replay(run, round_number, update)
        if run.groups.rank == 0:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def replay(run: RlRun, round_number: int, update: int) -> dict:
    """Go through the recorded rounds up to the update wanted; returns both sides of that update."""
    while run.state.round < round_number:
        run.state.round += 1
        experts = run.config.rollout.router_replay
        record = rounds.read(run.config.run.dir, run.state.round, with_experts=experts)
        for expected, got in _redo(run, record, last=update):
            if run.state.round == round_number and got.update == update:
                return _compared(run, record, expected, got)
    raise ValueError(f"update: got {update}; round {round_number} has no such update, or the start lies after it")


def _redo(run: RlRun, record: RoundRecord, last: int):
    """Pairs (recorded, done again) of the round's updates, up to `last`."""
    batch = phases.inference(run, record.groups)
    for expected, samples in zip(record.updates, phases.split_round(run, batch), strict=True):
        phases.update(run, batch, samples)
        if phases.is_refresh_due(run):
            run.policy.keep_copy(REFERENCE)
        yield expected, run.updates[-1]
        if run.state.update == last:
            return
    run.updates.clear()


def _compared(run: RlRun, record: RoundRecord, expected: UpdateRecord, got: UpdateRecord) -> dict:
    names = ("loss", "grad_norm", "digest")
    return {
        "round": record.round,
        "update": got.update,
        "recorded": {name: getattr(expected, name) for name in names},
        "replayed": {name: getattr(got, name) for name in names},
        "layout": {"recorded": record.layout, "replayed": str(run.layout)},
        "identical": all(getattr(expected, name) == getattr(got, name) for name in names),
    }
