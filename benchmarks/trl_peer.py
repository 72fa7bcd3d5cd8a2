"""TRL's GRPOTrainer as the other system in the GRPO step benchmark.

The step is TRL's own: `GRPOTrainer.train()` runs in a greenlet, which stands still between two steps until it is asked
for the next one. So it runs in the main thread, with one team of OpenMP threads, as it does outside a benchmark.
The trainer is subclassed to read the clock around its phases, and its `generate` is given one more logits processor,
which ends row i at its appointed length. Nothing else is changed.

What was chosen, and why. The figures are CPU seconds of a step (or of what is named) on one core, with torch 2.13,
transformers 5.23, TRL 1.16 and the models of `benchmarks.models`; "mixed" and "equal" are the regimes of lengths.

- fp32, as both systems are, and no gradient checkpointing, which TRL has on by default and which only costs time here.
- 16 sequences at a time in the forwards and the backward, added up to one update. qwen2 mixed, for 128, 32, 16 and 8 at
  a time: 11.4, 10.4, 10.1 and 9.8 s; equal is indifferent. TRL pads all of them to the longest either way.
- sdpa attention for qwen2 (mixed: 10.3 s, eager 11.7 s); eager attention for deepseek_v3 (mixed: 20.1 s, sdpa 22.4 s).
- grouped_mm experts, the default of transformers. deepseek_v3 mixed: 20.1 s, eager 20.8 s.
- all 128 rows in one `generate`, with the dynamic KV cache. The static cache was no faster with qwen2 and slower with
  deepseek_v3; continuous batching took 12.4 s to generate 48 tokens a row where this takes 0.6 s. vLLM needs a GPU.
- fused AdamW, no weight decay, gradient norm clipped at 1.
- `loss_type="grpo"`, two-sided clip 0.2, one update a rollout: old log-probs are then the policy's own, so TRL skips
  their forward, and a step is generation, the reference's forward, the policy's forward and backward, and AdamW.
- no logging, no evaluation, no checkpoints, no progress bar, no network.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import DistributedType
from datasets import Dataset
from greenlet import greenlet
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.workload import PHASES, StepReport, reward

STEPS_PER_EPOCH = 64
MICRO_BATCH_ROWS = 16
ATTENTION = {"qwen2": "sdpa", "deepseek_v3": "eager"}

FIXED_ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "shuffle_dataset": False,
    "temperature": 1.0,
    "epsilon": 0.2,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "use_bias_correction_kl": False,
    "num_iterations": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "max_steps": 1_000_000,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class PhaseClock:
    """Adds up the seconds spent in named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block towards `phase`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        """Count `seconds` towards `phase`."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class ForcedLengths(LogitsProcessor):
    """Row i draws the end-of-sequence token as its `lengths[i]`-th token and never before.

    Costs one column write a token, and one row write for each row that ends.
    """

    def __init__(self, lengths: Sequence[int], eos_token_id: int) -> None:
        self._eos_token_id = eos_token_id
        ending: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            ending.setdefault(length, []).append(row)
        self._ending = {length: torch.tensor(rows) for length, rows in ending.items()}
        self._num_drawn = 0

    def restart(self) -> None:
        """Begin a new rollout."""
        self._num_drawn = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask `scores` (rows, vocabulary) in place, as `generate` hands over a copy of the logits."""
        self._num_drawn += 1
        scores[:, self._eos_token_id] = -torch.inf
        rows = self._ending.get(self._num_drawn)
        if rows is not None:
            scores[rows] = -torch.inf
            scores[rows, self._eos_token_id] = 0.0
        return scores


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a clock around its phases and a check on the lengths of its completions."""

    def __init__(self, *args: Any, clock: PhaseClock, lengths: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = clock
        self._lengths = list(lengths)
        forced = ForcedLengths(lengths, self.processing_class.eos_token_id)
        self.model.generate = functools.partial(self._forced_generate, self.model.generate, forced)
        self.accelerator.backward = self._clocked("backward", self.accelerator.backward)

    def _clocked(self, phase: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._clock(phase):
                return function(*args, **kwargs)

        return call

    @staticmethod
    def _forced_generate(generate: Any, forced: ForcedLengths, **kwargs: Any) -> torch.Tensor:
        forced.restart()
        return generate(logits_processor=LogitsProcessorList([forced]), **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock("generate"):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        drawn = [len(token_ids) for token_ids in completion_ids]
        assert drawn == self._lengths, f"completions of {drawn} tokens, {self._lengths} were appointed"
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if model is not self.ref_model:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self._clock("reference_forward"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's forward and the loss."""
        with self._clock("policy_forward"):
            return super().compute_loss(*args, **kwargs)

    def _clip_grad_norm(self, model: PreTrainedModel) -> Any:
        with self._clock("optimizer"):
            return super()._clip_grad_norm(model)


class TakeTurns(TrainerCallback):
    """Gives way to whoever resumed the trainer between two steps, and times AdamW and the zeroing of the gradients."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._optimizer_began = 0.0

    def _give_way(self, control: TrainerControl) -> None:
        go_on = greenlet.getcurrent().parent.switch()
        control.should_training_stop = not go_on

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Everything is built; wait for the first step to be asked for."""
        self._give_way(control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Gradients are clipped; AdamW comes next."""
        self._optimizer_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """The gradients are zeroed; hand over, and wait for the next step to be asked for."""
        self._clock.add("optimizer", time.perf_counter() - self._optimizer_began)
        self._give_way(control)


def even_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The workload's reward in the form in which GRPOTrainer calls a reward function."""
    return [reward(token_ids) for token_ids in completion_ids]


class TrlPeer:
    """TRL's GRPOTrainer on one CPU process, one step at a time.

    `lengths` has one entry per completion, prompt by prompt, and its length is a multiple of that of `prompts`.
    `micro_batch_rows` sequences pass through the model at once in the log-prob forwards and the backward; generation
    takes all at once. `overrides` replace arguments of GRPOConfig, `model_kwargs` those of `from_pretrained`: for
    trying other choices than the module's. Raises ValueError on numbers of rows that do not divide.
    """

    name = "trl"

    def __init__(
        self,
        model_dir: Path,
        prompts: Sequence[str],
        lengths: Sequence[int],
        kl: float = 0.001,
        threads: int = 2,
        seed: int = 0,
        micro_batch_rows: int = MICRO_BATCH_ROWS,
        overrides: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        num_rows = len(lengths)
        if num_rows % len(prompts) or num_rows == len(prompts):
            raise ValueError(
                f"lengths: got {num_rows} for {len(prompts)} prompts, GRPO needs the same number, 2 or more, for each"
            )
        if num_rows % micro_batch_rows:
            raise ValueError(f"micro_batch_rows: got {micro_batch_rows}, must divide the {num_rows} rows of a step")
        family = AutoConfig.from_pretrained(model_dir).model_type
        attention = ATTENTION.get(family, "sdpa")
        torch.set_num_threads(threads)
        self._num_tokens = sum(lengths)
        self._clock = PhaseClock()
        self._folder = tempfile.TemporaryDirectory(prefix="trl-peer-")
        arguments = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": micro_batch_rows,
            "gradient_accumulation_steps": num_rows // micro_batch_rows,
            "num_generations": num_rows // len(prompts),
            "max_completion_length": max(lengths),
            "beta": kl,
            "seed": seed,
            "model_init_kwargs": {"dtype": "float32", "attn_implementation": attention, **(model_kwargs or {})},
            **FIXED_ARGUMENTS,
            **(overrides or {}),
        }
        self._trainer = TimedTrainer(
            model=str(model_dir),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            args=GRPOConfig(**arguments),
            train_dataset=Dataset.from_dict({"prompt": list(prompts) * STEPS_PER_EPOCH}),
            reward_funcs=even_share,
            callbacks=[TakeTurns(self._clock)],
            clock=self._clock,
            lengths=lengths,
        )
        self._trainer.remove_callback(PrinterCallback)
        assert self._trainer.accelerator.distributed_type == DistributedType.NO, "one process, not a world of one"
        self._training = greenlet(self._trainer.train)
        self._training.switch()

    def step(self) -> StepReport:
        """One GRPO step. An error of TRL's comes through as it is; RuntimeError once the trainer has stopped."""
        self._clock.seconds.clear()
        begin = time.perf_counter()
        self._training.switch(True)
        seconds = time.perf_counter() - begin
        if self._training.dead:
            raise RuntimeError("GRPOTrainer has come to its end, no step can be taken any more")
        phases = {phase: self._clock.seconds.get(phase, 0.0) for phase in PHASES}
        phases["other"] = seconds - sum(phases.values())
        return StepReport(seconds=seconds, completion_tokens=self._num_tokens, phases=phases)

    def close(self) -> None:
        """Let the trainer come to its end, and remove its folder."""
        if not self._training.dead:
            self._training.switch(False)
        self._folder.cleanup()
