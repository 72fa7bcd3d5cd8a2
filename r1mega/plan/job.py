"""A configuration -> the plain numbers a plan is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1mega.config.check import longest_response
from r1mega.config.choices import (
    GENERATING_LOOPS,
    DataFormat,
    DeviceType,
    EngineKind,
    KvCacheDtype,
    Loop,
    Mtp,
    Packing,
    ParamDtype,
)
from r1mega.config.schedule import max_tokens_at, most_tokens
from r1mega.config.schema import Config
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout
from r1mega.plan.activations import Compute, Pack
from r1mega.plan.engine import Engine
from r1mega.plan.memory import States
from r1mega.plan.rows import rows_of

GIB = float(1 << 30)
FILL = 0.9  # of micro-batches, on the mean (algo.packing; ours)
WINDOW_FILL = 0.9998  # of chunks of a window of 4,096 (benchmarks/packing.py on the lengths of R1's 800k set)
_GENERATED, _SUPERVISED = 0.3, 0.2  # mean of a response over the longest; see plan.mean_response_tokens
_PAD = 1.15  # positions over tokens where rows of a pack of like lengths are padded to the longest (ours)


@dataclass(frozen=True)
class Job:
    """What a run computes, in numbers.

    Lengths are in tokens. `max_tokens` is the limit of a micro-batch, `longest` a whole sequence at most that is
    trained on, `longest_generated` one that engines write, evaluations included; `mean_limit` is the limit of
    responses on the mean of all rounds, where it is scheduled. Without `trains` engines do all the work.
    """

    updates: int
    samples_per_update: int
    mean_prompt: float
    mean_response: float
    longest: int
    longest_response: int
    max_tokens: int
    trains: bool = True
    is_rl: bool = False
    chunks_per_update: int = 0  # over all data-parallel parts, where that is what is given; 0: it follows
    updates_per_round: int = 1
    samples_per_question: int = 1
    mean_limit: float = 0.0
    longest_generated: int = 0
    has_anchor: bool = False
    has_reference: bool = False

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence on the mean."""
        return self.mean_prompt + self.mean_response

    @property
    def tokens_per_update(self) -> float:
        """Prompts and responses of an update."""
        return self.samples_per_update * self.mean_length

    def micro_batches(self, layout: Layout) -> int:
        """Of an update on each data-parallel part; an interleaved pipeline takes a multiple of its stages."""
        if self.chunks_per_update:
            return math.ceil(self.chunks_per_update / layout.dp)
        count = max(1, math.ceil(self.tokens_per_update / layout.dp / (self.max_tokens * FILL)))
        return math.ceil(count / layout.pp) * layout.pp if layout.vpp > 1 else count

    def worst_pack(self, layout: Layout) -> Pack:
        """The largest micro-batch that can come: full, of sequences of unlike lengths, nearly all of it responses."""
        samples = max(1, math.ceil(self.samples_per_update / layout.dp))
        tokens = min(self.max_tokens, samples * self.longest)
        share = self.longest_response / self.longest if self.is_rl else 1.0
        is_one = self.longest >= tokens
        padded = tokens if is_one else round(tokens * _PAD)
        return Pack(min(self.longest, tokens), tokens, round(tokens * share), padded, padded * self.longest, is_one)


def job_of(config: Config) -> Job:
    """What the configured loop computes."""
    by_loop = {Loop.sft: _sft, Loop.reward_model: _reward_model, Loop.reject: _reject, Loop.evaluate: _evaluate}
    return by_loop.get(config.stage.loop, _rl)(config)


def _sft(config: Config) -> Job:
    """Chunks of a window hold as many sequences as fill them."""
    sft, plan = config.sft, config.plan
    prompt, response = plan.mean_prompt_tokens or 0.0, plan.mean_response_tokens or _SUPERVISED * sft.max_length
    samples, chunks = sft.batch_size, 0
    if sft.packing is Packing.window:
        chunks = sft.chunks_per_update
        samples = max(1, round(chunks * sft.max_tokens_per_micro_batch * WINDOW_FILL / (prompt + response)))
    return Job(
        updates=sft.updates,
        samples_per_update=samples,
        chunks_per_update=chunks,
        mean_prompt=prompt,
        mean_response=response,
        longest=sft.max_length,
        longest_response=sft.max_length,
        max_tokens=sft.max_tokens_per_micro_batch,
    )


def _reward_model(config: Config) -> Job:
    """Two sequences of a row of pairs; the last update takes the rows that are left."""
    settings, rows = config.reward_model, rows_of(config)
    assert rows, "validity.problems refuses what has no rows"
    return Job(
        updates=math.ceil(rows * settings.epochs / settings.batch_size),
        samples_per_update=settings.batch_size * (2 if config.data.format is DataFormat.pairs else 1),
        mean_prompt=config.plan.mean_prompt_tokens or 0.0,
        mean_response=config.plan.mean_response_tokens or _SUPERVISED * settings.max_length,
        longest=settings.max_length,
        longest_response=settings.max_length,
        max_tokens=settings.max_tokens_per_micro_batch,
    )


def _rl(config: Config) -> Job:
    """Memory by the longest response of the whole run; times by the mean of the limits of its rounds."""
    algo, prompts = config.algo, config.data.max_prompt_tokens
    longest = most_tokens(config)[1]
    starts = range(0, max(1, algo.updates), max(1, algo.updates_per_round))
    limit = sum(max_tokens_at(config, start) for start in starts) / len(starts)
    return Job(
        is_rl=True,
        updates=algo.updates,
        updates_per_round=algo.updates_per_round,
        samples_per_update=algo.samples_per_round // algo.updates_per_round,
        samples_per_question=algo.group_size,
        mean_prompt=config.plan.mean_prompt_tokens or prompts / 4,
        mean_response=config.plan.mean_response_tokens or _GENERATED * limit,
        longest=prompts + longest,
        longest_response=longest,
        max_tokens=algo.max_tokens_per_micro_batch,
        mean_limit=limit,
        longest_generated=prompts + longest_response(config)[1],
        has_anchor=algo.updates_per_round > 1,
        has_reference=algo.kl_coef > 0,
    )


def _reject(config: Config) -> Job:
    """An "update" is a round of questions; as many as the rows make, else one."""
    questions, each = config.algo.questions_per_round, config.curate.samples
    return _generated(
        config,
        updates=math.ceil((rows_of(config) or 1) / questions),
        samples=questions * each,
        each=each,
        prompts=config.data.max_prompt_tokens,
        limit=longest_response(config)[1],
    )


def _evaluate(config: Config) -> Job:
    """One "update" is the whole benchmark."""
    benchmark, rows = config.benchmark, rows_of(config)
    assert rows, "validity.problems refuses what has no rows"
    return _generated(
        config,
        updates=1,
        samples=rows * benchmark.samples,
        each=benchmark.samples,
        prompts=benchmark.max_prompt_tokens,
        limit=longest_response(config)[1],
    )


def _generated(config: Config, *, updates: int, samples: int, each: int, prompts: int, limit: int) -> Job:
    """A loop of engines alone: responses of up to `limit` tokens, `each` to a prompt of up to `prompts`."""
    return Job(
        trains=False,
        updates=updates,
        samples_per_update=samples,
        samples_per_question=each,
        mean_prompt=config.plan.mean_prompt_tokens or prompts / 4,
        mean_response=config.plan.mean_response_tokens or _GENERATED * limit,
        longest=prompts + limit,
        longest_response=limit,
        max_tokens=prompts + limit,
        mean_limit=limit,
        longest_generated=prompts + limit,
    )


def compute_of(config: Config) -> Compute:
    """How layers compute."""
    memory = config.memory
    return Compute(
        layer_spec=str(config.device.layer_spec),
        itemsize=4 if config.precision.params is ParamDtype.fp32 else 2,
        fp8=config.precision.fp8 and not config.precision.emulate_fp8,
        emulates_fp8=config.precision.emulate_fp8,
        recompute=str(memory.recompute),
        recompute_modules=tuple(memory.recompute_modules),
        recompute_num_layers=memory.recompute_num_layers,
        chunk_tokens=memory.logprob_chunk_tokens,
        balances=config.model.router_balance_coef > 0,
        unevenness=config.plan.expert_unevenness,
        on_cpu=config.device.type is DeviceType.cpu,
    )


def states_of(config: Config) -> States:
    """How parameters and their optimizer states are held. Where there is a GPU there is Transformer Engine (the extra
    `gpu`), and with it a fused Adam."""
    return States(
        params=4 if config.precision.params is ParamDtype.fp32 else 2,
        moments=4 if config.precision.moments is ParamDtype.fp32 else 2,
        offloads=config.memory.offload,
        steps_in_place=config.device.type is DeviceType.cuda,
    )


def engine_of(config: Config, fields: HfFields) -> Engine | None:
    """One engine; None where nothing is generated."""
    if config.stage.loop not in GENERATING_LOOPS:
        return None
    held = str(config.precision.params)
    if config.rollout.engine is EngineKind.embedded:
        return Engine(fields, 1, 1, held, 4.0 if held == "fp32" else 2.0)
    sglang = config.sglang
    dtype = str(sglang.dtype or held)
    wide = 4.0 if dtype == "fp32" else 2.0
    cache = {KvCacheDtype.auto: wide, KvCacheDtype.bf16: 2.0}.get(sglang.kv_cache_dtype, 1.0)
    drafts = sglang.speculative_steps > 0
    return Engine(fields, sglang.tp, sglang.attn_dp, dtype, cache, sglang.redundant_experts, drafts)


def trains_mtp(config: Config, fields: HfFields) -> bool:
    """Whether the multi-token-prediction layer is computed in training."""
    return fields.num_mtp_layers > 0 and config.model.mtp is Mtp.train
