"""Where every artifact of a pipeline comes from: lineage.json, made of the manifests of the stages that are done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1mega.config.choices import ArtifactKind, StageRun
from r1mega.config.schema_pipeline import PipelineConfig
from r1mega.pipeline.digest import Digests, counts_of
from r1mega.pipeline.files import write_json
from r1mega.pipeline.manifest import shown
from r1mega.pipeline.stage import Stage

LINEAGE_FILE = "lineage.json"
_PROGRAM = "program"
_OF_MANIFEST = ("key", "seconds", "counts", "code")


def write(
    stages: Mapping[str, Stage], pipeline: PipelineConfig, done: Mapping[str, Mapping[str, Any]], digests: Digests
) -> Path | None:
    """Write lineage.json into the directory of this seed; nothing where no stage is done."""
    if not done:
        return None
    home = next(iter(stages.values())).place.home
    write_json(home / LINEAGE_FILE, build(stages, pipeline, done, digests))
    digests.save()
    return home / LINEAGE_FILE


def build(
    stages: Mapping[str, Stage], pipeline: PipelineConfig, done: Mapping[str, Mapping[str, Any]], digests: Digests
) -> dict[str, Any]:
    """Nodes are artifacts, `stage` of a node being who made it (null: nobody, it is a source). An edge goes from what a
    stage reads, a tool's own program included, to each of what it leaves."""
    nodes: dict[str, dict[str, Any]] = {}
    edges: list[dict[str, str]] = []
    lines: list[dict[str, Any]] = []
    for name, stage in stages.items():
        if name not in done:
            continue
        manifest = done[name]
        root = stage.place.root
        read = []
        for said in manifest["inputs"].values():
            if said["from"] not in nodes:
                nodes[said["from"]] = _source(said, pipeline, root)
            read.append(said["from"])
        if stage.spec.run is StageRun.tool:
            program = f"{_PROGRAM}:{stage.spec.tool}"
            nodes[program] = _program(program, stage.program, digests)
            read.append(program)
        for output, left in manifest["outputs"].items():
            made = f"{name}.{output}"
            nodes[made] = {"id": made, **{key: left[key] for key in ("kind", "path", "sha256")}, "stage": name}
            nodes[made]["counts"] = left["counts"]
            edges += [{"from": source, "to": made, "stage": name} for source in dict.fromkeys(read)]
        line = {"name": name, "about": stage.spec.about, **{key: manifest[key] for key in _OF_MANIFEST}}
        lines.append(line | {"config": stage.described() | {"digest": manifest["config_digest"]}})
    return {"nodes": list(nodes.values()), "edges": edges, "stages": lines}


def _source(said: Mapping[str, Any], pipeline: PipelineConfig, root: Path) -> dict[str, Any]:
    name, path = said["from"], root / said["path"]
    kind = pipeline.sources[name].kind
    counts = counts_of(path) if path.exists() else {}
    return {
        "id": name, "kind": str(kind), "path": said["path"], "sha256": said["sha256"], "stage": None, "counts": counts
    }  # fmt: skip


def _program(name: str, path: Path, digests: Digests) -> dict[str, Any]:
    return {
        "id": name,
        "kind": _PROGRAM,
        "path": shown(path, path.parents[1]),
        "sha256": digests.of(path, ArtifactKind.checkpoint),
        "stage": None,
        "counts": counts_of(path),
    }


def ancestors(lineage: Mapping[str, Any], artifact: str) -> set[str]:
    """Ids of all that an artifact is made of, itself left out."""
    before: dict[str, list[str]] = {}
    for edge in lineage["edges"]:
        before.setdefault(edge["to"], []).append(edge["from"])
    found: set[str] = set()
    left = [artifact]
    while left:
        for name in before.get(left.pop(), []):
            if name not in found:
                found.add(name)
                left.append(name)
    return found


def problems(lineage: Mapping[str, Any]) -> list[str]:
    """What is wrong with a lineage, in words: an artifact that reaches no source, or is made of what is not there or
    of itself; empty where every artifact's lineage reaches its sources."""
    nodes = {node["id"]: node for node in lineage["nodes"]}
    sources = {name for name, node in nodes.items() if node["stage"] is None}
    made = {edge["to"] for edge in lineage["edges"]}
    said = [f"{name} is a source, and something is said to make it" for name in sorted(sources & made)]
    for edge in lineage["edges"]:
        said += [f"an edge names {edge[end]}, which is no node" for end in ("from", "to") if edge[end] not in nodes]
    for name in nodes:
        before = ancestors(lineage, name)
        if name in before:
            said.append(f"{name} is made of itself")
        ends = {one for one in before if one not in made}
        if name not in sources and (not ends or not ends <= sources):
            said.append(f"{name} does not reach its sources" + "".join(f"; {one} is none" for one in ends - sources))
    return said
