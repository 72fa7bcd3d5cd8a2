"""Pipelines of stub stages: real processes of a small program that does in moments what a stage does in days."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.config.schema import Config, RunConfig
from r1mega.config.schema_pipeline import PipelineConfig, PipelineOutput, PipelineSource, PipelineStage
from r1mega.pipeline import lineage, manifest, run

sys.path.insert(0, str(Path(__file__).parent))

# Writes `text` joined from its inputs; `fold` makes the output depend on their length modulo it, for early cut-off.
PROGRAM = """
import json, sys, time
from pathlib import Path
out, seed, fold, *inputs = sys.argv[1:]
texts = [Path(name).read_text() for name in inputs]
if any("FAIL" in text for text in texts):
    sys.exit("told to fail")
with Path(__file__).with_name("times").open("a") as times:
    print(out.split("/")[-2], "begins", file=times)
time.sleep(float(Path(__file__).with_name("seconds").read_text()))
with Path(__file__).with_name("times").open("a") as times:
    print(out.split("/")[-2], "ends", file=times)
size = sum(map(len, texts))
score = size % int(fold) if int(fold) else size
Path(out).write_text(json.dumps({"metrics": {"score": score, "seed": int(seed)}}) + "\\n")
"""


class Stubs:
    """A pipeline of stub stages in a folder, run in this process; the stages are children."""

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place / "run"
        self.program = place / "stub.py"
        self.program.write_text(PROGRAM)
        (place / "seconds").write_text("0")
        self.pipeline = PipelineConfig(title="Stubs")

    def source(self, name: str, text: str) -> Path:
        """A file that no stage makes."""
        path = self.place / f"{name}.jsonl"
        path.write_text(text)
        self.pipeline.sources[name] = PipelineSource(str(path), ArtifactKind.prompts)
        return path

    def stage(self, name: str, *inputs: str, fold: int = 0) -> PipelineStage:
        """A stage that reads these artifacts and leaves `out`."""
        named = {f"in{number}": reference for number, reference in enumerate(inputs)}
        self.pipeline.stages[name] = PipelineStage(
            about=f"stub {name}",
            run=StageRun.tool,
            tool=str(self.program),
            arguments=["{out}", "{seed}", str(fold), *(f"{{{key}}}" for key in named)],
            inputs=named,
            outputs={"out": PipelineOutput("out.json", ArtifactKind.report)},
            minutes=10.0,
        )
        return self.pipeline.stages[name]

    def diamond(self) -> None:
        """Two sources; base -> left, right -> join; right reads the second source too."""
        self.source("questions", '{"q": 1}\n')
        self.source("more", '{"q": 2}\n')
        self.stage("base", "questions")
        self.stage("left", "base.out")
        self.stage("right", "base.out", "more")
        self.stage("join", "left.out", "right.out")

    def run(self, root: Path | None = None) -> int:
        """As `r1mega pipeline`, the exit code."""
        config = Config(run=RunConfig(dir=str(root or self.root)), pipeline=self.pipeline)
        return run.run(config, run.Asked(["run.dir=DIR"], compose=_refuse))

    def manifest(self, name: str, root: Path | None = None) -> dict[str, Any]:
        """What a stage's directory says."""
        found = manifest.read((root or self.root) / "stages" / name)
        assert found is not None
        return found

    def lineage(self) -> dict[str, Any]:
        """What lineage.json says."""
        return json.loads((self.root / lineage.LINEAGE_FILE).read_text())

    def report(self) -> dict[str, Any]:
        """What report.json says."""
        return json.loads((self.root / "report.json").read_text())

    def times(self) -> list[str]:
        """`STAGE begins` and `STAGE ends` of all stages, as they came."""
        return (self.place / "times").read_text().splitlines()

    def starts(self, *names: str) -> dict[str, int]:
        """Stage, all or these -> its directory's inode, which tells one start from another."""
        return {name: (self.root / "stages" / name).stat().st_ino for name in names or self.pipeline.stages}

    def ran_again(self, before: dict[str, int]) -> set[str]:
        """Stages that have run since."""
        return {name for name, start in self.starts().items() if before.get(name) != start}


def _refuse(overrides: Sequence[str]) -> Config:
    raise AssertionError(f"a pipeline of tools composes nothing: {overrides}")


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)
