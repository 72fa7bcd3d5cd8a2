"""A configuration -> the objects of the loops that learn from given rows: supervised fine-tuning, reward models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from r1mega.config.choices import Packing, PastThinking
from r1mega.config.schema import Config
from r1mega.data.order import EpochOrder
from r1mega.data.preference import READERS, PreferenceExample, PreferenceSource, tokenize_preferences
from r1mega.data.sft_index import Reading, SftFile, open_file
from r1mega.data.sft_source import BatchSource, WindowSource
from r1mega.loop.checkpoints import restore
from r1mega.loop.wire import Run, wired

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class SftRun(Run):
    """What the SFT loop has besides: which rows come next, and the rows."""

    examples: BatchSource | WindowSource | None = None
    rows: SftFile | None = None


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
        # The launcher has built the index, but where it was told to check no files.
        if run.groups.rank == 0:
            run.rows = open_rows(config, run.tokenizer)
        dist.barrier(group=run.groups.control)
        if run.groups.rank != 0:
            run.rows = open_rows(config, run.tokenizer, builds=False)
        run.examples = source_of(config, run.rows)
        if run.is_resumed:
            restore(config, run.groups, run.policy, run.state, run.examples, ())
        yield run


def open_rows(config: Config, tokenizer: PreTrainedTokenizerBase, *, builds: bool = True) -> SftFile:
    """The rows of data.train, none longer than sft.max_length. Raises ValueError as data.sft_index.open_file, or for a
    longer one."""
    sft = config.sft
    reading = Reading(tokenizer, str(config.data.template), sft.past_thinking is PastThinking.keep)
    rows = open_file(config.data.train, index_dir(config), reading, builds=builds)
    rows.require(sft.max_length)
    return rows


def index_dir(config: Config) -> Path:
    """Where the index of data.train is kept."""
    return Path(config.sft.index_dir or Path(config.run.dir) / "index")


def source_of(config: Config, rows: SftFile) -> BatchSource | WindowSource:
    """What says which rows each update learns from."""
    sft, data = config.sft, config.data
    order = EpochOrder(len(rows), config.run.seed, data.shuffle, rows.content)
    if sft.packing is Packing.batch:
        return BatchSource(order, sft.batch_size)
    return WindowSource(
        order,
        rows.tokens,
        window=sft.window,
        max_tokens=sft.max_tokens_per_micro_batch,
        chunks_per_update=sft.chunks_per_update,
    )


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
