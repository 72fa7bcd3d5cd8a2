"""The record of a round on disk: its samples and what its updates gave, so that they can be done again.

One safetensors file a round, RUN_DIR/rounds/round-000003.safetensors: numbers by token as tensors, the rest as JSON in
the header; with router replay also the experts the engine chose. Texts are left out; the tokens say them.
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

from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score, Span

FOLDER = "rounds"
_TENSORS = ("lengths", "token_ids", "rollout_logprobs")
_EXPERTS = "routed_experts"


@dataclass(frozen=True)
class UpdateRecord:
    """What one update gave. `digest` is of all weights after it (MegatronPolicy.digest)."""

    update: int
    loss: float
    grad_norm: float
    digest: str


@dataclass(frozen=True)
class RoundRecord:
    """A round: the version that the engines served at its start, the samples, its updates in order."""

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
    header = {
        "round": record.round,
        "weight_version": record.weight_version,
        "seed": record.seed,
        "layout": record.layout,
        "updates": [asdict(update) for update in record.updates],
    }
    path = path_of(run_dir, record.round)
    path.parent.mkdir(exist_ok=True)
    write_groups(path, record.groups, header)
    if keep:
        for old in sorted(path.parent.glob("round-*.safetensors"))[:-keep]:
            old.unlink()
    return path


def write_groups(path: Path, groups: Sequence[SampleGroup], header: dict[str, Any]) -> None:
    """Write groups without their texts, and what else is to stand in the header; a reader sees all or nothing."""
    samples = [sample for group in groups for sample in group.samples]
    tensors = {
        "lengths": torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int32),
        "token_ids": torch.tensor([token for sample in samples for token in sample.token_ids], dtype=torch.int32),
        # The engine's own fp32 numbers, kept as fp64: what was read back is what was written.
        "rollout_logprobs": torch.tensor([v for s in samples for v in s.rollout_logprobs], dtype=torch.float64),
    }
    if samples and samples[0].routed_experts is not None:
        tensors[_EXPERTS] = torch.cat([sample.routed_experts for sample in samples])
    listed = [{"prompt": asdict(g.prompt), "samples": [_facts(sample) for sample in g.samples]} for g in groups]
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"record": json.dumps(header | {"groups": listed})})
    os.replace(partial, path)


def read(run_dir: Path | str, number: int, *, with_experts: bool = False) -> RoundRecord:
    """The record of a round. Raises ValueError where there is none, it cannot be read, or lacks the experts asked for.

    The experts are views of the file: who does not look at them holds none of them in memory.
    """
    path = path_of(run_dir, number)
    if not path.is_file():
        kept = sorted(int(found.stem.removeprefix("round-")) for found in path.parent.glob("round-*.safetensors"))
        have = f"{kept[0]} to {kept[-1]}" if kept else "none"
        raise ValueError(f"{path}: no such file; the round must have been recorded (logger.rounds); there are: {have}")
    try:
        groups, header = read_groups(path, with_experts=with_experts)
    except ValueError as error:
        raise ValueError(f"{error}; choose another round") from error
    updates = [UpdateRecord(**entry) for entry in header["updates"]]
    names = ("round", "weight_version", "seed", "layout")
    return RoundRecord(**{name: header[name] for name in names}, groups=groups, updates=updates)


def read_groups(path: Path, *, with_experts: bool = False) -> tuple[list[SampleGroup], dict[str, Any]]:
    """What `write_groups` wrote, and the header. Raises ValueError where it cannot be read, or lacks the experts."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["record"])
            with_experts = with_experts and any(entry["samples"] for entry in header["groups"])
            tensors = {name: file.get_tensor(name) for name in (*_TENSORS, *[_EXPERTS] * with_experts)}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    lengths = tensors["lengths"].tolist()
    tokens = iter(tensors["token_ids"].split(lengths))
    logprobs = iter(tensors["rollout_logprobs"].split(lengths))
    groups = [
        SampleGroup(
            _prompt(entry["prompt"]),
            [_sample(facts, next(tokens).tolist(), next(logprobs).tolist()) for facts in entry["samples"]],
        )
        for entry in header["groups"]
    ]
    if with_experts:
        samples = [(group.prompt, sample) for group in groups for sample in group.samples]
        rows = [len(prompt.token_ids) + len(sample.token_ids) - 1 for prompt, sample in samples]
        for (_, sample), experts in zip(samples, tensors[_EXPERTS].split(rows), strict=True):
            sample.routed_experts = experts
    return groups, header


def _prompt(facts: dict[str, Any]) -> Prompt:
    """A prompt from JSON, which knows lists only."""
    return Prompt(**{name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()})


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
        "spans": [[span.weight_version, span.start, span.end] for span in sample.spans],
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
        # A record may be without them: all tokens are then of weight_version.
        spans=tuple(Span(*span) for span in facts.get("spans", ())),
    )
