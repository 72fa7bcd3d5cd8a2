"""Rules of the training of reward models, and of those that reinforcement learning asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r1mega.config.checkpoint_files import check_weights, is_megatron
from r1mega.config.choices import DataFormat, Loop, Mtp
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

REWARD_MODEL_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    *(
        (f"reward_model.{name}", ((">=", 1),))
        for name in ("batch_size", "epochs", "max_length", "max_tokens_per_micro_batch")
    ),
    ("reward.judge", ((">=", 0),)),
    ("reward.judge_seconds", ((">", 0),)),
    ("reward.judge_attempts", ((">=", 1),)),
    ("reward.judge_in_flight", ((">=", 1),)),
)
MODELS = ("helpful", "safety")


def check_reward_models(config: Config, *, here: bool = True) -> Iterator[Fault]:
    """All that this file knows; with `here` false nothing is asked of this machine's files."""
    yield from _check_training(config)
    if here:
        yield from _check_models_asked(config)
    yield from _check_judge(config)


def _check_training(config: Config) -> Iterator[Fault]:
    """What a training of a reward model needs besides the bounds."""
    if config.stage.loop is not Loop.reward_model:
        return
    settings, data = config.reward_model, config.data
    if data.format not in (DataFormat.pairs, DataFormat.labels):
        constraint = "stage.loop=reward_model reads pairs or labels"
        yield Fault("data.format", data.format.value, constraint, "use data=pairs or data=labels")
    if config.model.mtp is Mtp.train:
        constraint = "a reward model has no multi-token-prediction layer"
        yield Fault("model.mtp", "train", constraint, "set model.mtp=drop")
    each = 2 if data.format is DataFormat.pairs else 1
    longest, limit = each * settings.max_length, settings.max_tokens_per_micro_batch
    if longest > limit:
        field = "reward_model.max_tokens_per_micro_batch"
        got = f"{settings.max_length}" + (" for each of a pair" if each == 2 else "")
        constraint = f"must fit {field}={limit}"
        yield Fault("reward_model.max_length", got, constraint, f"lower it or raise {field} to {longest}")
    if settings.batch_size < config.parallel.dp:
        constraint = f"must be at least parallel.dp={config.parallel.dp}: each replica needs a row"
        yield Fault("reward_model.batch_size", str(settings.batch_size), constraint, "raise reward_model.batch_size")


def _check_models_asked(config: Config) -> Iterator[Fault]:
    """The checkpoints of reward models that RL asks are there."""
    if config.stage.loop is not Loop.rl:
        return
    for name in MODELS:
        weight, path = getattr(config.reward, name), getattr(config.reward, f"{name}_model")
        field = f"reward.{name}_model"
        if weight == 0:
            if path is not None:
                constraint = f"reward.{name}=0 leaves that model out"
                yield Fault(field, path, constraint, f"set reward.{name} to its weight, or {field}=null")
            continue
        if path is None:
            constraint = f"reward.{name}={weight:g} needs the checkpoint of a reward model"
            yield Fault(field, "nothing", constraint, f"set {field}=DIR, or reward.{name}=0")
        elif not Path(path).is_dir():
            yield Fault(field, path, "must be a directory", f"correct the path: {field}=DIR")
        elif is_megatron(Path(path)):
            constraint = "must be a Hugging Face checkpoint"
            remedy = "name the run's hf/, or convert it: python tools/convert_checkpoint.py megatron-to-hf"
            yield Fault(field, path, constraint, remedy)
        else:
            yield from check_weights(Path(path), field)


def _check_judge(config: Config) -> Iterator[Fault]:
    """Where the judge has a weight, it has an address."""
    reward = config.reward
    if config.stage.loop not in (Loop.rl, Loop.reject) or reward.judge == 0:
        return
    if not str(reward.judge_url or "").startswith(("http://", "https://")):
        got = reward.judge_url or "nothing"
        constraint = f"reward.judge={reward.judge:g} needs a server, http://HOST:PORT"
        yield Fault("reward.judge_url", got, constraint, "set reward.judge_url, or reward.judge=0")
    if not reward.judge_model:
        constraint = "the server is asked for a model by its name"
        yield Fault("reward.judge_model", "nothing", constraint, "set reward.judge_model=NAME")
    if not reward.judge_domains:
        constraint = "no answer would be judged"
        yield Fault("reward.judge_domains", "[]", constraint, "name the domains, or set reward.judge=0")
