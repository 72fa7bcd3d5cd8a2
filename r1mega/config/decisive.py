"""The fields that decide what a run computes: two runs that agree in them are the same run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from enum import Enum
from typing import Any

from r1mega.config.choices import Loop, Packing, Schedule
from r1mega.config.schema import Config

# Whole sections, and fields of others. All else (layout, logs, checkpoints, evaluation ...) may change on resuming.
_SECTIONS = ("stage", "model", "precision", "reward", "algo", "sft", "reward_model", "optim")
_FIELDS = {
    "run": ("seed",),
    "data": (
        "train", "format", "question_key", "answer_key", "template", "max_prompt_tokens", "shuffle", "general",
        "general_share",
    ),
    "rollout": (
        "temperature", "top_p", "max_tokens", "max_tokens_from", "stop", "over_sampling", "carry_partial",
        "max_staleness",
    ),
}  # fmt: skip
# Within those sections: what changes no result but where rounding does, names, and what ends a run or lets it go on.
_INDIFFERENT = {
    *(f"{section}.max_tokens_per_micro_batch" for section in ("algo", "sft", "reward_model")),
    *(f"reward.judge_{name}" for name in ("url", "seconds", "attempts", "in_flight")),
    "stage.name", "model.card", "model.base", "reward.max_failed_share", "reward.sandbox", "sft.index_dir",
}  # fmt: skip


def decisive(config: Config) -> dict[str, Any]:
    """Every decisive field by its dotted path, as plain values.

    A run may be made longer, where its learning rate does not depend on its length.
    """
    if config.stage.loop is Loop.evaluate:
        return _of_evaluation(config)
    listed = {section: tuple(field.name for field in fields(getattr(config, section))) for section in _SECTIONS}
    if config.stage.loop is Loop.reject:
        return _of_rejection(config)
    mine = "sft" if config.stage.loop is Loop.sft else "algo"
    may_grow = {"sft.updates", "algo.updates"}
    if config.optim.schedule is not Schedule.constant:
        may_grow -= {f"{mine}.updates"}
    indifferent = _INDIFFERENT
    if config.sft.packing is Packing.window:  # whose chunks have that size
        indifferent = _INDIFFERENT - {"sft.max_tokens_per_micro_batch"}
    values = {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, names in (listed | _FIELDS).items()
        for name in names
    }
    return {
        path: value.value if isinstance(value, Enum) else value
        for path, value in values.items()
        if path not in may_grow | indifferent
    }


def _of_evaluation(config: Config) -> dict[str, Any]:
    """What decides the samples of an evaluation. Where they are read from does not: the content is compared."""
    sections = {"model": config.model, "precision": config.precision, "benchmark": config.benchmark}
    values = {
        f"{name}.{field.name}": getattr(part, field.name) for name, part in sections.items() for field in fields(part)
    }
    values |= {"run.seed": config.run.seed, "stage.loop": config.stage.loop, "rollout.engine": config.rollout.engine}
    free = {"benchmark.data", "benchmark.plot"}
    return {
        path: value.value if isinstance(value, Enum) else value for path, value in values.items() if path not in free
    }


def _of_rejection(config: Config) -> dict[str, Any]:
    """What decides the samples of a rejection sampling and their scores. How they are curated may change: the samples
    that are kept are then curated anew. Where questions are read from does not count: the content is compared."""
    names = {
        "model": [field.name for field in fields(config.model)],
        "precision": [field.name for field in fields(config.precision)],
        "reward": [field.name for field in fields(config.reward)],
        "data": ("template", "max_prompt_tokens"),
        "rollout": ("engine", "temperature", "top_p", "max_tokens", "stop"),
        "curate": ("samples", "opening", "cut_at"),
        "run": ("seed",),
        "stage": ("loop",),
    }
    values = {
        f"{section}.{name}": getattr(getattr(config, section), name) for section, of in names.items() for name in of
    }
    return {
        path: value.value if isinstance(value, Enum) else value
        for path, value in values.items()
        if path not in _INDIFFERENT
    }


def digest(config: Config) -> str:
    """A digest of the decisive fields, for a checkpoint to name the run it is of."""
    text = json.dumps(decisive(config), sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
