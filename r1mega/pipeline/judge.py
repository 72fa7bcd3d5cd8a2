"""What a stage has to do: nothing, go on, or begin, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from r1mega.config import io
from r1mega.config.choices import SAMPLING_LOOPS, StageRun
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema_pipeline import PipelineConfig
from r1mega.pipeline import manifest as manifests
from r1mega.pipeline.digest import Digests
from r1mega.pipeline.manifest import Input, Status
from r1mega.pipeline.stage import Stage


class Need(StrEnum):
    """What has to be done for a stage."""

    nothing = "done"
    go_on = "to go on"
    begin = "to run"
    again = "to run again"
    wait = "waits"


@dataclass(frozen=True)
class Verdict:
    """What a stage needs; `why` in words. `key` and `inputs` are known unless it waits."""

    need: Need
    why: str = ""
    key: str = ""
    inputs: Mapping[str, Input] | None = None
    manifest: Mapping[str, Any] | None = None


def judge(stage: Stage, pipeline: PipelineConfig, done: Mapping[str, Mapping[str, Any]], digests: Digests) -> Verdict:
    """`done` holds the manifests of the stages that are done."""
    waiting = [name for name in stage.before if name not in done]
    manifest = manifests.read(stage.dir)
    if waiting:
        return Verdict(Need.wait, f"for {', '.join(waiting)}", manifest=manifest)
    absent = [name for name, path in stage.paths.items() if not path.exists()]
    if absent:
        named = ", ".join(f"{name} ({stage.paths[name]})" for name in absent)
        return Verdict(Need.wait, f"for its source {named}", manifest=manifest)
    inputs = {name: _input(stage, name, pipeline, done, digests) for name in stage.paths}
    digests.save()
    key = stage.key({name: one.sha256 for name, one in inputs.items()})
    if manifest is None:
        is_used = stage.dir.exists() and any(stage.dir.iterdir())
        why = "its directory holds something else" if is_used else ""
        return Verdict(Need.again if is_used else Need.begin, why, key, inputs)
    need, why = _compare(stage, manifest, key, inputs, digests)
    return Verdict(need, why, key, inputs, manifest)


def _input(
    stage: Stage, name: str, pipeline: PipelineConfig, done: Mapping[str, Mapping[str, Any]], digests: Digests
) -> Input:
    reference = stage.origins[name]
    before, _, output = reference.rpartition(".")
    if before:
        sha256 = done[before]["outputs"][output]["sha256"]
    else:
        sha256 = digests.of(stage.paths[name], pipeline.sources[reference].kind)
    return Input(stage.paths[name], sha256, reference)


def _compare(
    stage: Stage, manifest: Mapping[str, Any], key: str, inputs: Mapping[str, Input], digests: Digests
) -> tuple[Need, str]:
    if manifest["key"] != key:
        return Need.again, _changed(stage, manifest, inputs)
    if manifest["status"] == Status.done:
        if manifests.is_whole(stage, manifest, digests):
            return Need.nothing, ""
        return Need.again, "what it left has been changed or removed"
    said = manifest.get("error", "it was ended") if manifest["status"] == Status.failed else "it was ended"
    return (Need.go_on if can_go_on(stage) else Need.again), said


def _changed(stage: Stage, manifest: Mapping[str, Any], inputs: Mapping[str, Input]) -> str:
    before = {name: said["sha256"] for name, said in manifest["inputs"].items()}
    changed = [name for name, one in inputs.items() if before.get(name) != one.sha256]
    parts = [f"input {', '.join(changed)} changed"] if changed else []
    parts += ["its configuration changed"] if manifest["config_digest"] != stage.config_digest else []
    return "; ".join(parts) or "what it reads or leaves changed"


def can_go_on(stage: Stage) -> bool:
    """A training from a checkpoint of its own; what samples alone, an evaluation say, from its samples; a tool begins
    anew."""
    if stage.spec.run is StageRun.tool or not (stage.dir / io.FILE_NAME).exists():
        return False
    if stage.general_config.stage.loop in SAMPLING_LOOPS:
        return (stage.dir / "samples.jsonl").exists()
    return any((stage.dir / "checkpoints").glob("update-*"))


def require_sources(stages: Mapping[str, Stage], pipeline: PipelineConfig) -> None:
    """Raises ConfigError naming every source that these stages read and that is not there."""
    used = {ref for stage in stages.values() for ref in stage.origins.values() if ref in pipeline.sources}
    faults = []
    for name in (name for name in pipeline.sources if name in used):
        source = pipeline.sources[name]
        place = next(p for stage in stages.values() for key, p in stage.paths.items() if stage.origins[key] == name)
        about = f" ({source.about})" if source.about else ""
        field = f"pipeline.sources.{name}.path"
        if source.path is None:
            faults.append(Fault(field, "nothing", f"must name a {source.kind}{about}", f"set {field}=PATH"))
        elif not place.exists():
            faults.append(Fault(field, source.path, f"is not there{about}", "correct the path"))
    if faults:
        raise ConfigError(faults)
