"""The few numbers a run comes down to, as summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1mega.metrics.history import series
from r1mega.metrics.jsonl import split_nonfinite

SUMMARY_FILE = "summary.json"
REQUIRED = (
    "pass_at_1_first",
    "pass_at_1_last",
    "response_tokens_first",
    "response_tokens_last",
    "updates",
    "rounds",
    "seconds",
    "world_size",
    "layout",
    "seed",
)


def summarize_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """First and last pass@1 and response length, the updates and rounds done and the seconds taken.

    The length is that of the held-out samples (`eval/response_tokens`, measured with pass@1) and, in a run that does
    not report it, that of the training samples. A number the run never measured is None.
    """
    _, passes = series(records, "eval/pass_at_1")
    _, lengths = series(records, "eval/response_tokens")
    if not lengths:
        _, lengths = series(records, "rollout/response_tokens")
    return {
        "pass_at_1_first": passes[0] if passes else None,
        "pass_at_1_last": passes[-1] if passes else None,
        "response_tokens_first": lengths[0] if lengths else None,
        "response_tokens_last": lengths[-1] if lengths else None,
        "updates": max((record["update"] for record in records), default=0),
        "rounds": max((record["round"] for record in records), default=0),
        "seconds": max((record.get("time", 0.0) for record in records), default=0.0),
    }


def write_summary(run_dir: str | os.PathLike[str], values: Mapping[str, Any]) -> Path:
    """Write `values` to summary.json in `run_dir`, keys sorted; a reader sees the old file or the new one, never half.

    A value that was not measured is None; NaN and infinity become null and are named under `nonfinite`.
    Raises ValueError naming the keys of `REQUIRED` that are missing.
    """
    missing = [key for key in REQUIRED if key not in values]
    if missing:
        raise ValueError(f"summary lacks {', '.join(missing)}; give None for what the run did not measure")
    content, nonfinite = split_nonfinite(values)
    if nonfinite:
        content["nonfinite"] = nonfinite
    path = Path(run_dir) / SUMMARY_FILE
    partial = path.with_name(f"{SUMMARY_FILE}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
