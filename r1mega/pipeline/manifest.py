"""What a stage's directory says of it: manifest.json, written before it starts and when it has ended."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from r1mega.config.check_pipeline import outputs_of
from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.pipeline.digest import Digests, counts_of
from r1mega.pipeline.files import read_json, write_json
from r1mega.pipeline.stage import Stage

MANIFEST_FILE, LOG_FILE = "manifest.json", "stage.log"


class Status(StrEnum):
    """Of a manifest."""

    running = "running"
    done = "done"
    failed = "failed"


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads; `origin` is `STAGE.OUTPUT` or a source's name."""

    path: Path
    sha256: str
    origin: str


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a stage's directory; None where there is none."""
    return read_json(directory / MANIFEST_FILE)


def begin(stage: Stage, key: str, inputs: Mapping[str, Input], seconds: float) -> dict[str, Any]:
    """Say that the stage runs, `seconds` of it having been spent before."""
    manifest = {
        "stage": stage.name,
        "kind": str(stage.spec.run),
        "status": str(Status.running),
        "key": key,
        "inputs": {
            name: {"path": shown(one.path, stage.place.root), "sha256": one.sha256, "from": one.origin}
            for name, one in inputs.items()
        },
        "config_digest": stage.config_digest,
        "code": code(),
        "outputs": {},
        "counts": {},
        "seconds": round(seconds, 3),
    }
    stage.dir.mkdir(parents=True, exist_ok=True)
    write_json(stage.dir / MANIFEST_FILE, manifest)
    return manifest


def fail(stage: Stage, manifest: dict[str, Any], why: str, seconds: float) -> None:
    """Say that the stage has failed, and why."""
    values = manifest | {"status": str(Status.failed), "error": why, "seconds": round(seconds, 3)}
    write_json(stage.dir / MANIFEST_FILE, values)


def finish(stage: Stage, manifest: dict[str, Any], seconds: float, digests: Digests) -> dict[str, Any]:
    """Say what the stage has left. Raises ValueError naming outputs that are not there, or a report that is none."""
    outputs = outputs_of(stage.spec)
    missing = [f"{name} ({stage.output(name)})" for name in outputs if not stage.output(name).exists()]
    if missing:
        raise ValueError(f"it ended well, and has not left its outputs: {', '.join(missing)}")
    _require_reports([stage.output(name) for name, output in outputs.items() if output.kind is ArtifactKind.report])
    found = {
        name: {
            "path": shown(stage.output(name), stage.place.root),
            "sha256": digests.of(stage.output(name), output.kind),
            "kind": str(output.kind),
            "counts": counts_of(stage.output(name)),
        }
        for name, output in outputs.items()
    }
    digests.save()
    ended = manifest | {"status": str(Status.done), "outputs": found, "seconds": round(seconds, 3)}
    ended["counts"] = _counts(stage, found)
    write_json(stage.dir / MANIFEST_FILE, ended)
    return ended


def _require_reports(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ValueError(
                f"it ended well, and has left no report: {path}: must hold a JSON object ({error})"
            ) from None
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise ValueError(f"it ended well, and has left no report: {path}: must hold a JSON object, got a {kind}")


def is_whole(stage: Stage, manifest: Mapping[str, Any], digests: Digests) -> bool:
    """Whether every output is there as the manifest of a stage that is done says."""
    for said in manifest["outputs"].values():
        path = stage.place.root / said["path"]
        if not path.exists() or digests.of(path, ArtifactKind(said["kind"])) != said["sha256"]:
            return False
    return manifest["outputs"].keys() == outputs_of(stage.spec).keys()


def _counts(stage: Stage, outputs: Mapping[str, Any]) -> dict[str, int]:
    """Of the whole stage: updates of a training, problems and samples of an evaluation, rows of its outputs."""
    rows = {f"{name}_rows": one["counts"]["rows"] for name, one in outputs.items() if "rows" in one["counts"]}
    if stage.spec.run is StageRun.evaluate:
        report = read_json(stage.dir / "report.json") or {}
        return {name: report[name] for name in ("problems", "samples") if name in report} | rows
    if stage.spec.run is StageRun.train:
        summary = read_json(stage.dir / "summary.json") or {}
        return {name: summary[name] for name in ("updates", "rounds") if summary.get(name)} | rows
    return rows


def shown(path: Path, root: Path) -> str:
    """A path inside the pipeline's directory as relative to it, so that the directory may be moved."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@cache
def code() -> dict[str, str | None]:
    """Version and commit of what runs; no commit where it is not a checkout."""
    try:
        version: str | None = importlib.metadata.version("r1mega")
    except importlib.metadata.PackageNotFoundError:
        version = None
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():  # installed, perhaps inside a repository of something else
        return {"version": version, "commit": None}
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {"version": version, "commit": None}
    return {"version": version, "commit": done.stdout.strip() or None}
