"""A configuration -> the objects of the loops that learn from given rows: supervised fine-tuning, reward models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from r1mega.config.schema import Config
from r1mega.data.preference import READERS, PreferenceExample, PreferenceSource, tokenize_preferences
from r1mega.data.sft import SftSource, read_sft, tokenize_sft
from r1mega.loop.checkpoints import restore
from r1mega.loop.wire import Run, wired


@dataclass
class SftRun(Run):
    """What the SFT loop has besides."""

    examples: SftSource | None = None


@dataclass
class RewardModelRun(Run):
    """What the training of a reward model has besides; its `policy` is a MegatronRewardModel."""

    examples: PreferenceSource | None = None
    num_examples: int = 0
    held_out: list[PreferenceExample] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return reward_model_updates(self.config, self.num_examples)


@contextmanager
def wire_sft(config: Config) -> Iterator[SftRun]:
    """The SFT loop's objects on this rank."""
    with wired(config, SftRun, total_updates=config.sft.updates) as run:
        rows = read_sft(config.data.train)
        examples = tokenize_sft(rows, run.tokenizer, str(config.data.template), config.sft.max_length)
        run.examples = SftSource(examples, config.run.seed, config.data.shuffle)
        if run.is_resumed:
            restore(config, run.groups, run.policy, run.state, run.examples, ())
        yield run


@contextmanager
def wire_reward_model(config: Config) -> Iterator[RewardModelRun]:
    """The objects of the training of a reward model on this rank."""
    data, read = config.data, READERS[str(config.data.format)]
    rows = read(data.train)
    with wired(config, RewardModelRun, total_updates=reward_model_updates(config, len(rows))) as run:
        limit, template = config.reward_model.max_length, str(data.template)
        examples = tokenize_preferences(rows, run.tokenizer, template, limit)
        run.examples, run.num_examples = PreferenceSource(examples, config.run.seed, data.shuffle), len(examples)
        if data.eval is not None:
            run.held_out = tokenize_preferences(read(data.eval)[: data.eval_limit], run.tokenizer, template, limit)
        if run.is_resumed:
            restore(config, run.groups, run.policy, run.state, run.examples, ())
        yield run


def reward_model_updates(config: Config, num_rows: int) -> int:
    """Optimizer steps that see every row `reward_model.epochs` times; the last one takes what is left."""
    return -(-num_rows * config.reward_model.epochs // config.reward_model.batch_size)
