"""r1mega as one system of the GRPO step benchmark: the phases of its own loop, on one process.

The step is `loop.phases` as a run takes it: rollout by the embedded engine, scoring, the reference's log-probs, one
update through Megatron's schedule, DDP and distributed Adam, and the publish of the new weights to the engine, which
the other system does not need because it generates with the model it trains. Two things are not a run's: the engine is
told the length of each completion, and the reward is the benchmark's.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from benchmarks.workload import NUM_PROMPTS, PHASES, SAMPLES_PER_PROMPT, StepReport, reward
from r1mega.config import choices, schema
from r1mega.parallel import device, groups
from r1mega.parallel.layout import Layout

device.prepare("cpu")  # before the first import of Megatron

from megatron.core.pipeline_parallel import schedules
from transformers import AutoTokenizer

from r1mega.data.prompts import PromptSource
from r1mega.loop import phases
from r1mega.loop.runlog import RunLog
from r1mega.loop.wire import RlRun
from r1mega.metrics.timer import PhaseTimer
from r1mega.models import hf_fields
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_io import CheckpointReader
from r1mega.rollout.collector import Collector, Lockstep
from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.train.optimizer import AdamSettings
from r1mega.train.policy import MegatronPolicy
from r1mega.types import Completion, Prompt, Request, SamplingParams, Score
from r1mega.weights import memory


class _ForcedLengths(EmbeddedEngine):
    """The embedded engine, each completion exactly as long as it is told."""

    lengths: Sequence[int] = ()

    def generate(self, requests: Sequence[Request], params: SamplingParams, on_finished=None) -> list[Completion]:
        """As the engine's, with `lengths` as the limit of every sample."""
        rows = [self.lengths[i * SAMPLES_PER_PROMPT : (i + 1) * SAMPLES_PER_PROMPT] for i in range(len(requests))]
        return super().generate(requests, params, on_finished, limits=rows)


class R1megaPeer:
    """One process of r1mega with a policy, a reference and an engine of the same checkpoint."""

    name = "r1mega"

    def __init__(
        self, model_dir: Path, prompts: Sequence[str], lengths: Sequence[int], kl: float, threads: int, seed: int
    ) -> None:
        _join_world_of_one()
        config = schema.Config()
        config.run.seed = seed
        config.device.type, config.device.threads = choices.DeviceType.cpu, threads
        config.algo.group_size, config.algo.questions_per_round = SAMPLES_PER_PROMPT, NUM_PROMPTS
        config.algo.updates_per_round, config.algo.updates = 1, 10**6
        config.algo.kl_coef, config.rollout.max_tokens = kl, max(lengths)
        config.algo.max_tokens_per_micro_batch = 1 << 20
        config.optim.lr = 1e-4
        self._clock = {phase: 0.0 for phase in PHASES}
        self._run = self._wire(config, model_dir, lengths)
        encode = self._run.tokenizer.encode
        asked = [Prompt(str(i), text, "", tuple(encode(text))) for i, text in enumerate(prompts)]
        source = PromptSource(asked, seed, shuffle=False)  # as many as a round asks for: the same in each
        self._run.rollouts = Lockstep(self._run.collector, source, len(asked), SAMPLES_PER_PROMPT)
        self._tokens = sum(lengths)
        self._time_megatron()
        self._run.policy.keep_copy("reference")
        phases.publish(self._run)

    def step(self) -> StepReport:
        """One round of one update."""
        run = self._run
        self._clock = dict.fromkeys(PHASES, 0.0)
        begin = time.perf_counter()
        run.state.round += 1
        phases.rollout(run)
        batch = phases.inference(run, phases.reward(run))
        for samples in phases.split_round(run, batch):
            phases.update(run, batch, samples)
        phases.publish(run)
        seconds = time.perf_counter() - begin
        tokens = sum(len(sample.token_ids) for sample in batch.samples)
        assert tokens == self._tokens, f"{tokens} tokens were generated, {self._tokens} were asked for"
        spent = run.timer.finish_round()
        clock = self._clock | {"generate": spent["rollout"], "reference_forward": spent.get("inference", 0.0)}
        clock["publish"] = spent["publish"]
        clock["other"] = seconds - sum(clock.values())
        return StepReport(seconds=seconds, completion_tokens=tokens, phases=clock)

    def close(self) -> None:
        """Leave the world of one."""
        groups.shutdown()

    def _wire(self, config: schema.Config, model_dir: Path, lengths: Sequence[int]) -> RlRun:
        world = groups.initialize(Layout(), "cpu", seed=0, timeout_minutes=5, threads=config.device.threads)
        fields = hf_fields.read(model_dir)
        adam = AdamSettings(lr=config.optim.lr, weight_decay=0.0)
        policy = MegatronPolicy(fields, world, ModelOptions(), adam)
        policy.load(CheckpointReader(model_dir))
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        engine = _ForcedLengths(model_dir, tokenizer, max_batch=len(lengths))
        engine.lengths = lengths
        # Completions end where they are told to: no token of the vocabulary ends one.
        engine._end_tokens = set()
        decode = partial(tokenizer.decode, skip_special_tokens=False)
        collector = Collector(engine, 1, decode, _score, world.control)
        log = RunLog(config, enabled=False, model=fields.family, layout="1", world_size=1)
        return RlRun(
            config, Layout(), world, fields, policy, tokenizer, log, PhaseTimer(), collector=collector,
            publish=lambda weights, version: memory.publish(weights, engine, version),
        )  # fmt: skip

    def _time_megatron(self) -> None:
        """Read the clock around Megatron's forward and backward step and around the optimizer."""
        policy = self._run.policy

        def timed(function, phase):
            def call(*args, **kwargs):
                begin = time.perf_counter()
                result = function(*args, **kwargs)
                # The reference's forward runs through the same function, in its own phase.
                if self._run.timer.current != "inference":
                    self._clock[phase] += time.perf_counter() - begin
                return result

            return call

        schedules.forward_step = timed(schedules.forward_step, "policy_forward")
        schedules.backward_step = timed(schedules.backward_step, "backward")
        policy.optimizer_step = timed(policy.optimizer_step, "optimizer")


def _score(_prompt: Prompt, text: str) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(Score(reward(text.encode())))
    return future


def _join_world_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
