"""Is there room on the disk for what a run writes? An estimate from the number of parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from r1mega.config.choices import EngineDtype, EngineKind, Loop, ParamDtype, Transport
from r1mega.config.faults import Fault
from r1mega.config.schema import Config
from r1mega.models.hf_fields import HfFields
from r1mega.models.size import num_parameters

_MASTER_BYTES = 4  # the optimizer's own copy of a parameter is fp32
_SERVED_VERSIONS = 2  # one that servers load while the next is written


@dataclass(frozen=True)
class Written:
    """Files of one kind: how many times they are there at once, and their bytes each."""

    field: str
    what: str
    place: Path
    count: int
    nbytes: int


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that `path`, which need not be there yet, is or would be on."""
    return shutil.disk_usage(_existing(path)).free


def written(config: Config, fields: HfFields) -> list[Written]:
    """What the run writes and keeps, checkpoints, exports and published weights; a resumed run has the first ones."""
    if config.stage.loop in (Loop.reject, Loop.evaluate):
        return []  # texts, which are small
    count, run_dir = num_parameters(fields), Path(config.run.dir)
    weights = _bytes_of(config.precision.params)
    is_resumed = config.run.resume or config.run.resume_from is not None
    found = []
    checkpoint = config.checkpoint
    if checkpoint.every > 0:
        copies = weights if config.stage.loop is Loop.rl else 0  # the reference
        each = count * (weights + copies + _MASTER_BYTES + 2 * _bytes_of(config.precision.moments))
        # An old one is removed when a newer one is whole.
        kept = 1 if is_resumed else checkpoint.keep_newest + checkpoint.keep_best + 1
        found.append(Written("checkpoint.every", "checkpoints", run_dir, kept, each))
    exports = int(config.export.hf)
    if config.export.every > 0 and not is_resumed:
        exports += _updates(config) // config.export.every
    if exports:
        found.append(Written("export.hf", "exports", run_dir, exports, 2 * count))
    sglang = config.sglang
    has_servers = config.stage.loop is Loop.rl and config.rollout.engine is EngineKind.sglang
    if has_servers and (sglang.transport is Transport.disk or sglang.recovery_copy):
        served = {EngineDtype.fp32: 4, EngineDtype.bf16: 2, EngineDtype.fp8: 1, None: weights}[sglang.dtype]
        each = served * count
        found.append(Written("sglang.weights_dir", "published weights", _shelf(config), _SERVED_VERSIONS, each))
    return found


def _updates(config: Config) -> int:
    """Optimizer steps of the run; those of a reward model follow from its rows, nearly one a line."""
    if config.stage.loop is Loop.reward_model:
        settings = config.reward_model
        with open(config.data.train, encoding="utf-8") as lines:
            return sum(1 for _ in lines) * settings.epochs // settings.batch_size
    return config.algo.updates if config.stage.loop is Loop.rl else config.sft.updates


def check_disk(config: Config, fields: HfFields, free_of: Callable[[Path], int] = free_bytes) -> Iterator[Fault]:
    """A fault for each file system on which what is written there has no room."""
    together: dict[int, list[Written]] = {}
    for files in written(config, fields):
        together.setdefault(_existing(files.place).stat().st_dev, []).append(files)
    for kinds in together.values():
        needed, free = sum(kind.count * kind.nbytes for kind in kinds), free_of(kinds[0].place)
        if needed <= free:
            continue
        field = "run.dir" if any(kind.field != "sglang.weights_dir" for kind in kinds) else "sglang.weights_dir"
        place = config.run.dir if field == "run.dir" else _shelf(config)
        listed = " + ".join(f"{kind.count} {kind.what} of {kind.nbytes / 1e9:,.1f} GB" for kind in kinds)
        constraint = f"needs about {needed / 1e9:,.1f} GB: {listed}"
        options = sorted({_SMALLER[kind.field] for kind in kinds})
        remedy = f"choose a place with more room, or {', or '.join(options)}"
        yield Fault(field, f"{free / 1e9:,.1f} GB free at {place}", constraint, remedy)


def _shelf(config: Config) -> Path:
    """Where published weights are written."""
    return Path(config.sglang.weights_dir or config.run.dir)


_SMALLER = {
    "checkpoint.every": "lower checkpoint.keep_newest or checkpoint.keep_best",
    "export.hf": "raise export.every or set export.hf=false",
    "sglang.weights_dir": "set sglang.weights_dir to another disk",
}


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _bytes_of(dtype: ParamDtype) -> int:
    return 4 if dtype is ParamDtype.fp32 else 2
