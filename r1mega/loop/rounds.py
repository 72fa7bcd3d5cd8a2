"""The record of a round on disk: its samples and what its updates gave, so that they can be done again.

One safetensors file a round, RUN_DIR/rounds/round-000003.safetensors: numbers by token as tensors, the rest as JSON in
the header. Texts are left out; the tokens say them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score

FOLDER = "rounds"
_TENSORS = ("lengths", "token_ids", "rollout_logprobs")


@dataclass(frozen=True)
class UpdateRecord:
    """What one update gave. `digest` is of all weights after it (MegatronPolicy.digest)."""

    update: int
    loss: float
    grad_norm: float
    digest: str


@dataclass(frozen=True)
class RoundRecord:
    """A round: the weights its samples were drawn with, the samples, its updates in order."""

    round: int
    weight_version: int
    seed: int
    layout: str
    groups: list[SampleGroup]
    updates: list[UpdateRecord]


def path_of(run_dir: Path | str, number: int) -> Path:
    """The file of a round."""
    return Path(run_dir) / FOLDER / f"round-{number:06d}.safetensors"


def write(run_dir: Path | str, record: RoundRecord, keep: int = 0) -> Path:
    """Write the record; a reader sees all of it or nothing. With `keep`, only so many of the newest files stay."""
    samples = [sample for group in record.groups for sample in group.samples]
    tensors = {
        "lengths": torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int32),
        "token_ids": torch.tensor([token for sample in samples for token in sample.token_ids], dtype=torch.int32),
        # The engine's own fp32 numbers, kept as fp64: what was read back is what was written.
        "rollout_logprobs": torch.tensor([v for s in samples for v in s.rollout_logprobs], dtype=torch.float64),
    }
    header = {
        "round": record.round,
        "weight_version": record.weight_version,
        "seed": record.seed,
        "layout": record.layout,
        "updates": [asdict(update) for update in record.updates],
        "groups": [
            {"prompt": asdict(g.prompt), "samples": [_facts(sample) for sample in g.samples]} for g in record.groups
        ],
    }
    path = path_of(run_dir, record.round)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"record": json.dumps(header)})
    os.replace(partial, path)
    if keep:
        for old in sorted(path.parent.glob("round-*.safetensors"))[:-keep]:
            old.unlink()
    return path


def read(run_dir: Path | str, number: int) -> RoundRecord:
    """The record of a round. Raises ValueError where there is none or it cannot be read."""
    path = path_of(run_dir, number)
    if not path.is_file():
        kept = sorted(int(found.stem.removeprefix("round-")) for found in path.parent.glob("round-*.safetensors"))
        have = f"{kept[0]} to {kept[-1]}" if kept else "none"
        raise ValueError(f"{path}: no such file; the round must have been recorded (logger.rounds); there are: {have}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); choose another round") from error
    lengths = tensors["lengths"].tolist()
    tokens = iter(tensors["token_ids"].split(lengths))
    logprobs = iter(tensors["rollout_logprobs"].split(lengths))
    groups = [
        SampleGroup(
            Prompt(**entry["prompt"] | {"token_ids": tuple(entry["prompt"]["token_ids"])}),
            [_sample(facts, next(tokens).tolist(), next(logprobs).tolist()) for facts in entry["samples"]],
        )
        for entry in header["groups"]
    ]
    updates = [UpdateRecord(**entry) for entry in header["updates"]]
    names = ("round", "weight_version", "seed", "layout")
    return RoundRecord(**{name: header[name] for name in names}, groups=groups, updates=updates)


def rewind(run_dir: Path | str, last: int) -> None:
    """Take away the records of rounds after `last`: a resumed run will do these rounds again."""
    for path in (Path(run_dir) / FOLDER).glob("round-*.safetensors"):
        if int(path.stem.removeprefix("round-")) > last:
            path.unlink()


def _facts(sample: Sample) -> dict[str, Any]:
    return {
        "prompt_id": sample.prompt_id,
        "index": sample.index,
        "finish_reason": str(sample.finish_reason),
        "weight_version": sample.weight_version,
        "score": None if sample.score is None else asdict(sample.score),
    }


def _sample(facts: dict[str, Any], token_ids: Sequence[int], logprobs: Sequence[float]) -> Sample:
    score = facts["score"]
    return Sample(
        prompt_id=facts["prompt_id"],
        index=facts["index"],
        token_ids=list(token_ids),
        loss_mask=[1] * len(token_ids),
        rollout_logprobs=list(logprobs),
        finish_reason=FinishReason(facts["finish_reason"]),
        weight_version=facts["weight_version"],
        score=None if score is None else Score(**score),
    )
