"""conversion.json: what became of every source tensor and what every target was made of, checked to be complete.

    {"format": 1, "source": {"path", "kind", "files": {name: bytes}}, "target": {"kind", "dtype"},
     "edits": [...], "copied": [...],
     "sources": {name: {"shape", "dtype", "xxh3_128"}},
     "targets": [{"name", "shape", "dtype", "xxh3_128", "file", "at", "nbytes", "from": [names], ...}]}

Digests are of a tensor's bytes in row-major order.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.conversion.hf_source import HfSource
from r1mega.conversion.plan import ConversionPlan, Part
from r1mega.conversion.worker import record_path

if TYPE_CHECKING:  # it imports torch.distributed.checkpoint, which other conversions need not wait for
    from r1mega.conversion.megatron_source import MegatronSource

PROOF_FILE = "conversion.json"


@dataclass(frozen=True)
class Report:
    """What was read and what was written."""

    sources: dict[str, dict[str, Any]]
    targets: list[dict[str, Any]]


def read_record(partial: Path, part: Part) -> list[dict[str, Any]]:
    """What a finished part recorded."""
    return json.loads(record_path(partial, part.index).read_text(encoding="utf-8"))


def check(source: HfSource | MegatronSource, plan: ConversionPlan, works: list[dict[str, Any]]) -> Report:
    """The whole record, once it shows that every tensor of the source was used and every target filled exactly once.

    A table that the edited target holds twice is used twice. Raises AssertionError otherwise: that is a fault of the
    converter, not of its input.
    """
    planned = [work for part in plan.parts for work in part.works]
    uses = Counter(name for work in works for name in work["from"])
    reads = Counter(id(work.piece) for work in planned)
    allowed = max(reads.values())
    assert set(uses) == source.names(), sorted(set(uses) ^ source.names())[:5]
    assert max(uses.values()) <= allowed, uses.most_common(3)
    filled = Counter(entry["name"] for work in works for entry in work["to"])
    wanted = Counter(output.name for work in planned for output in (*work.outputs, *work.scales))
    assert filled == wanted and set(wanted.values()) == {1}, (filled - wanted, wanted - filled)
    _check_boxes(works)
    digests = {name: digest for work in works for name, digest in work["from"].items()}
    described = source.describe()
    sources = {name: described[name] | {"xxh3_128": digests[name]} for name in sorted(digests)}
    targets = [entry | {"from": list(work["from"])} for work in works for entry in work["to"]]
    return Report(sources, targets)


def write(
    partial: Path, request: Any, source: HfSource | MegatronSource, report: Report, edits: list[str], copied: list[str]
) -> None:
    """Write conversion.json into the directory."""
    content = {
        "format": 1,
        "source": {
            "path": str(request.source.resolve()),
            "kind": source.kind,
            "files": {path.name: path.stat().st_size for path in source.files()},
        },
        "target": {"kind": request.to, "dtype": request.dtype},
        "edits": edits,
        "copied": copied,
        "sources": report.sources,
        "targets": report.targets,
    }
    (partial / PROOF_FILE).write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def _check_boxes(works: list[dict[str, Any]]) -> None:
    """Boxes of one tensor fill it: begun at different places, none beyond its end, and as large together."""
    boxes: dict[str, list[dict[str, Any]]] = {}
    for work in works:
        for entry in work["to"]:
            if "key" in entry:
                boxes.setdefault(entry["key"], []).append(entry)
    for key, entries in boxes.items():
        whole = entries[0]["of"]
        assert all(entry["of"] == whole for entry in entries), key
        assert len({tuple(entry["offset"]) for entry in entries}) == len(entries), key
        assert sum(math.prod(entry["shape"]) for entry in entries) == math.prod(whole), key
        for entry in entries:
            ends = [offset + size for offset, size in zip(entry["offset"], entry["shape"], strict=True)]
            assert all(end <= size for end, size in zip(ends, whole, strict=True)), (key, entry["offset"])
