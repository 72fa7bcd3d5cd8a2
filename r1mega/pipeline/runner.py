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


@dataclass(frozen=True)
class Running:
    """A stage that runs.

    Args:
        before: seconds that starts before this one took.
    """

    stage: Stage
    verdict: Verdict
    manifest: dict[str, Any]
    process: child.Child
    before: float

    @property
    def seconds(self) -> float:
        """That the stage has taken so far, starts before this one included."""
        return self.before + time.monotonic() - self.process.since


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
    running: dict[str, Running] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def look(self, names: Sequence[str] | None = None) -> None:
        """Judge stages without running any: all, or these after all that they need."""
        for name, stage in self.stages.items():
            if names is None or name in names:
                self._judge(stage)

    def run(self, only: str | None = None) -> int:
        """Run what has to be run, `only` this stage or all, `pipeline.at_once` of them at a time: 0, or the code that
        the first failed one ended with. After a failure none is begun; those that run come to their end."""
        left, code = dict(self.stages), 0
        try:
            while self.running or (left and not code and not self._told()):
                if not code and not self._told():
                    code = self._begin(left, only)
                failed = self._collect()
                code = code or failed
                if self.running:
                    self.shows(self)
                    time.sleep(child.POLL_SECONDS)
        finally:
            for one in self.running.values():
                one.process.close()
        return code or self._told()

    def _told(self) -> int:
        """The exit code of a pipeline that was told to end; 0: it was not."""
        if self.signals.ends:
            return 128 + self.signals.ends[0]
        return STOPPED if self.signals.stops else 0

    def _begin(self, left: dict[str, Stage], only: str | None) -> int:
        """Take from `left` what is done, or can begin now; 0, or 2 where a stage waits for what nobody makes."""
        for name, stage in list(left.items()):
            if len(self.running) >= self.pipeline.at_once:
                return 0
            if any(before in left or before in self.running for before in stage.before):
                continue
            del left[name]
            verdict = self._judge(stage)
            if only is not None and name != only:
                continue
            if verdict.need is Need.wait:  # of a stage alone; those before it are run else
                print(f"r1mega: stage {name} waits {verdict.why}", file=sys.stderr)
                return 2
            if verdict.need is not Need.nothing:
                self._start(stage, verdict)
            self.shows(self)
        return 0

    def _judge(self, stage: Stage) -> Verdict:
        verdict = judge.judge(stage, self.pipeline, self.done, self.digests)
        self.verdicts[stage.name] = verdict
        if verdict.need is Need.nothing:
            assert verdict.manifest is not None
            self.done[stage.name] = verdict.manifest
        return verdict

    def _start(self, stage: Stage, verdict: Verdict) -> None:
        assert verdict.inputs is not None
        goes_on = verdict.need is Need.go_on
        if not goes_on:
            move_aside(stage)
        before = _spent(stage) if goes_on else 0.0
        started = manifest.begin(stage, verdict.key, verdict.inputs, before)
        process = child.Child(
            self.command(stage, goes_on),
            stage.dir / LOG_FILE,
            minutes=stage.spec.minutes,
            signals=self.signals,
            ask=(lambda why: stop.ask(stage.dir, why)) if stage.spec.run is StageRun.train else None,
            keep_open=self.keep_open,
        )
        self.running[stage.name] = Running(stage, verdict, started, process, before)

    def _collect(self) -> int:
        """Take note of every stage that has ended: 0, or the code of the first that failed."""
        codes = []
        for one in list(self.running.values()):
            ended = one.process.check()
            if ended is not None:
                del self.running[one.stage.name]
                codes.append(self._conclude(one, ended))
                self.shows(self)
        return next((code for code in codes if code), 0)

    def _conclude(self, one: Running, ended: child.Ended) -> int:
        stage, verdict, seconds = one.stage, one.verdict, one.seconds
        why = ended.why or f"exit code {ended.code}"
        if ended.code == 0:
            try:
                self.done[stage.name] = finished = manifest.finish(stage, one.manifest, seconds, self.digests)
            except ValueError as error:
                why, ended = str(error), child.Ended(1)
            else:
                self.verdicts[stage.name] = Verdict(Need.nothing, "", verdict.key, verdict.inputs, finished)
                self.ran.append(stage.name)
                return 0
        manifest.fail(stage, one.manifest, why, seconds)
        self.failed.append(stage.name)
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
