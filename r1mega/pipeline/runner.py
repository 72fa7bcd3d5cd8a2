"""Walks the stages of one seed: skips what is done, goes on with what was broken off, runs what is left."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config.choices import StageRun
from r1mega.config.schema_pipeline import PipelineConfig
from r1mega.launch.supervise import tail
from r1mega.loop import stop
from r1mega.loop.stop import STOPPED
from r1mega.pipeline import child, judge, manifest
from r1mega.pipeline.digest import Digests
from r1mega.pipeline.judge import Need, Verdict
from r1mega.pipeline.manifest import LOG_FILE, MANIFEST_FILE
from r1mega.pipeline.stage import Stage

ASIDE = "aside"


@dataclass
class Walk:
    """The stages of one seed, and what has become of each. `shows` is called whenever something has changed, and
    several times a second while a stage runs.

    Args:
        command: what runs a stage (whether it goes on -> its words); None: as a stage says itself.
        keep_open: descriptors that the stages' leashes keep open.
        elsewhere: stages that another process may be running at this moment.
    """

    stages: Mapping[str, Stage]
    pipeline: PipelineConfig
    digests: Digests
    signals: child.Signals
    shows: Callable[[Walk], None] = lambda _walk: None
    command: Callable[[Stage, bool], Sequence[str]] = lambda stage, resume: stage.command(resume=resume)
    keep_open: Sequence[int] = ()
    elsewhere: Container[str] = ()
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    done: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    running: str | None = None
    since: float = 0.0
    ran: list[str] = field(default_factory=list)
    failed: str | None = None

    def look(self, names: Sequence[str] | None = None) -> None:
        """Judge stages without running any: all, or these after all that they need."""
        for name, stage in self.stages.items():
            if names is None or name in names:
                self._judge(stage)

    def run(self, only: str | None = None) -> int:
        """Run what has to be run, `only` this stage or all: 0, or the code that the first failed one ended with."""
        for name, stage in self.stages.items():
            if self.signals.ends or self.signals.stops:
                return 128 + self.signals.ends[0] if self.signals.ends else STOPPED
            verdict = self._judge(stage)
            if only is not None and name != only:
                continue
            if verdict.need is Need.wait:  # of a stage alone; those before it are run else
                print(f"r1mega: stage {name} waits {verdict.why}", file=sys.stderr)
                return 2
            if verdict.need is Need.nothing:
                self.shows(self)
                continue
            code = self._run_one(stage, verdict)
            if code:
                return code
        return 0

    def _judge(self, stage: Stage) -> Verdict:
        verdict = judge.judge(stage, self.pipeline, self.done, self.digests)
        self.verdicts[stage.name] = verdict
        if verdict.need is Need.nothing:
            assert verdict.manifest is not None
            self.done[stage.name] = verdict.manifest
        return verdict

    def _run_one(self, stage: Stage, verdict: Verdict) -> int:
        assert verdict.inputs is not None
        goes_on = verdict.need is Need.go_on
        if not goes_on:
            move_aside(stage)
        before = _spent(stage) if goes_on else 0.0
        started = manifest.begin(stage, verdict.key, verdict.inputs, before)
        self.running, self.since = stage.name, time.monotonic()
        self.shows(self)
        ended = child.run(
            self.command(stage, goes_on),
            stage.dir / LOG_FILE,
            minutes=stage.spec.minutes,
            signals=self.signals,
            ask=(lambda why: stop.ask(stage.dir, why)) if stage.spec.run is StageRun.train else None,
            tick=lambda: self.shows(self),
            keep_open=self.keep_open,
        )
        seconds = before + time.monotonic() - self.since
        self.running = None
        why = ended.why or f"exit code {ended.code}"
        if ended.code == 0:
            try:
                self.done[stage.name] = finished = manifest.finish(stage, started, seconds, self.digests)
            except ValueError as error:
                why, ended = str(error), child.Ended(1)
            else:
                self.verdicts[stage.name] = Verdict(Need.nothing, "", verdict.key, verdict.inputs, finished)
                self.ran.append(stage.name)
                self.shows(self)
                return 0
        manifest.fail(stage, started, why, seconds)
        self.failed = stage.name
        self.shows(self)
        self._say_why(stage, why, ended)
        return ended.code

    def _say_why(self, stage: Stage, why: str, ended: child.Ended) -> None:
        log = stage.dir / LOG_FILE
        print(f"r1mega: stage {stage.name}: {why}", file=sys.stderr)
        if ended.code != STOPPED and not self.signals.ends:
            for line in tail(log).splitlines():
                print(f"  | {line}", file=sys.stderr)
        print(f"log: {log}", file=sys.stderr)


def move_aside(stage: Stage) -> Path | None:
    """Put what the stage's directory holds out of the way; where it lies now. Nothing is removed but an empty folder.

    A kill in between leaves it in one place or the other.
    """
    if not stage.dir.exists():
        return None
    if not any(stage.dir.iterdir()):
        stage.dir.rmdir()
        return None
    aside = stage.place.home / ASIDE
    aside.mkdir(exist_ok=True)
    number = 1
    while (target := aside / f"{stage.name}-{number}").exists():
        number += 1
    shutil.move(stage.dir, target)
    return target


def _spent(stage: Stage) -> float:
    """Seconds that starts before this one took: the last one until its log ended, if it was killed."""
    said = manifest.read(stage.dir)
    if said is None:
        return 0.0
    log = stage.dir / LOG_FILE
    if said["status"] == manifest.Status.running and log.exists():
        lasted = log.stat().st_mtime - (stage.dir / MANIFEST_FILE).stat().st_mtime
        return said["seconds"] + max(0.0, lasted)
    return said["seconds"]
