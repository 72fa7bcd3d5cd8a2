"""Every rule the configuration itself must keep. All faults are found and reported together."""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.check_benchmark import BENCHMARK_BOUNDS, check_benchmark
from r1mega.config.check_cluster import check_cluster
from r1mega.config.check_curate import CURATE_BOUNDS, check_curate
from r1mega.config.check_dispatcher import check_dispatcher
from r1mega.config.check_engines import check_engines
from r1mega.config.check_memory import check_memory
from r1mega.config.check_pipeline import check_pipeline
from r1mega.config.check_plan import PLAN_BOUNDS
from r1mega.config.check_reward import REWARD_BOUNDS, check_rewards
from r1mega.config.check_reward_model import REWARD_MODEL_BOUNDS, check_reward_models
from r1mega.config.check_schedule import check_schedule
from r1mega.config.check_sft import SFT_BOUNDS, check_sft_batch
from r1mega.config.check_slurm import SLURM_BOUNDS, check_slurm
from r1mega.config.check_stage import check_stage
from r1mega.config.checkpoint_files import check_tokenizer, check_weights, is_megatron
from r1mega.config.choices import (
    GENERATING_LOOPS,
    DataFormat,
    DeviceType,
    Dispatcher,
    Init,
    LayerSpec,
    Loop,
    ParamDtype,
    Scheduler,
)
from r1mega.config.faults import Fault
from r1mega.config.io import FILE_NAME
from r1mega.config.schedule import most_tokens
from r1mega.config.schema import Config

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

# field, bounds it must keep; null is always allowed where the schema allows it.
BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("run.seed", ((">=", 0),)),
    ("run.timeout_minutes", ((">", 0),)),
    ("pipeline.at_once", ((">=", 1),)),
    *((f"parallel.{axis}", ((">=", 1),)) for axis in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")),
    ("model.moe_router_bias_update_rate", ((">=", 0),)),
    ("model.router_balance_coef", ((">=", 0),)),
    ("model.mtp_loss_coef", ((">=", 0),)),
    ("device.threads", ((">=", 1),)),
    ("memory.recompute_num_layers", ((">=", 1),)),
    ("memory.logprob_chunk_tokens", ((">=", 1),)),
    ("checkpoint.every", ((">=", 0),)),
    ("checkpoint.keep_newest", ((">=", 1),)),
    ("checkpoint.keep_best", ((">=", 0),)),
    ("logger.keep_rounds", ((">=", 0),)),
    ("data.max_prompt_tokens", ((">=", 1),)),
    ("data.eval_limit", ((">=", 1),)),
    ("data.general_share", ((">", 0), ("<", 1))),
    *REWARD_BOUNDS,
    ("rollout.engines", ((">=", 1),)),
    ("rollout.temperature", ((">", 0),)),
    ("rollout.top_p", ((">", 0), ("<=", 1))),
    ("rollout.max_tokens", ((">=", 1),)),
    ("rollout.max_batch", ((">=", 1),)),
    ("rollout.max_in_flight", ((">=", 1),)),
    ("rollout.over_sampling", ((">=", 1),)),
    ("rollout.max_staleness", ((">=", 0),)),
    ("rollout.probe_tolerance", ((">", 0),)),
    ("rollout.probe_outliers", ((">=", 0), ("<=", 1))),
    ("sglang.tp", ((">=", 1),)),
    ("sglang.ep", ((">=", 1),)),
    ("sglang.attn_dp", ((">=", 1),)),
    ("sglang.nodes_per_engine", ((">=", 1),)),
    ("sglang.first_port", ((">=", 1024), ("<", 65536))),
    ("sglang.first_gpu", ((">=", 0),)),
    ("sglang.memory_fraction", ((">", 0), ("<", 1))),
    ("sglang.max_cached_tokens", ((">=", 1),)),
    ("sglang.bucket_bytes", ((">=", 1),)),
    ("sglang.verify_share", ((">=", 0), ("<=", 1))),
    ("rollout.probe_sequences", ((">=", 0),)),
    ("sglang.redundant_experts", ((">=", 0),)),
    ("sglang.speculative_steps", ((">=", 0),)),
    ("sglang.startup_seconds", ((">", 0),)),
    ("sglang.hang_seconds", ((">", 0),)),
    ("sglang.restarts", ((">=", 0),)),
    ("algo.group_size", ((">=", 2),)),
    ("algo.questions_per_round", ((">=", 1),)),
    ("algo.updates_per_round", ((">=", 1),)),
    ("algo.updates", ((">=", 1),)),
    ("algo.clip_low", ((">=", 0),)),
    ("algo.clip_high", ((">=", 0),)),
    ("algo.kl_coef", ((">=", 0),)),
    ("algo.correction_cap", ((">=", 0),)),
    ("algo.reference_refresh", ((">=", 0),)),
    ("algo.max_tokens_per_micro_batch", ((">=", 1),)),
    *SFT_BOUNDS,
    ("optim.lr", ((">", 0),)),
    ("optim.min_lr", ((">=", 0),)),
    ("optim.warmup_updates", ((">=", 0),)),
    ("optim.beta1", ((">=", 0), ("<", 1))),
    ("optim.beta2", ((">=", 0), ("<", 1))),
    ("optim.eps", ((">", 0),)),
    ("optim.weight_decay", ((">=", 0),)),
    ("optim.clip_grad", ((">=", 0),)),
    ("evaluate.every", ((">=", 0),)),
    ("evaluate.temperature", ((">=", 0),)),
    ("evaluate.top_p", ((">", 0), ("<=", 1))),
    ("evaluate.max_tokens", ((">=", 1),)),
    ("logger.samples_per_round", ((">=", 0),)),
    ("export.every", ((">=", 0),)),
    *BENCHMARK_BOUNDS,
    *CURATE_BOUNDS,
    ("cluster.nodes", ((">=", 1),)),
    ("cluster.gpus_per_node", ((">=", 1),)),
    *REWARD_MODEL_BOUNDS,
    *(
        (f"cluster.{name}", ((">", 0),))
        for name in (
            "gpu_memory_gib",
            "gpu_bf16_tflops",
            "gpu_fp8_tflops",
            "gpu_memory_gb_per_s",
            "node_gb_per_s",
            "network_gb_per_s",
            "host_memory_gib",
            "disk_gb_per_s",
        )
    ),
    *PLAN_BOUNDS,
    *SLURM_BOUNDS,
)


def check(config: Config, *, here: bool = True) -> list[Fault]:
    """All faults of the configuration itself: bounds, rules between fields, run directory, checkpoint files.

    With `here` false, of what would be started somewhere else: nothing is asked of this machine, neither its files nor
    its packages.
    """
    bounds = list(check_bounds(config))
    if config.stage.loop is Loop.evaluate:  # which trains nothing
        return [
            *bounds,
            *(_check_run_dir(config) if here else ()),
            *(_check_checkpoint(config) if here else ()),
            *_check_device(config, here),
            *check_cluster(config),
            *check_engines(config, here=here),
            *(check_benchmark(config) if here else ()),
        ]
    faults = [
        *bounds,
        *(_check_run_dir(config) if here else ()),
        *(_check_checkpoint(config) if here else ()),
        *(check_stage(config) if here else ()),
        *_check_device(config, here),
        *check_cluster(config),
        *check_engines(config, here=here),
        *check_slurm(config),
        *_check_data(config, here),
        *check_schedule(config),
        *check_rewards(config),
        *check_reward_models(config, here=here),
        *check_curate(config, here=here),
        *_check_optim(config),
        *_check_lengths(config),
        *check_memory(config),
        *_check_saving(config),
        *check_pipeline(config.pipeline),
    ]
    if not any(fault.field.startswith(("algo.", "sft.", "parallel.dp")) for fault in bounds):
        faults += _check_batch(config)
    return faults


def longest_response(config: Config) -> tuple[str, int]:
    """The field that decides the longest text the run produces (sft: learns from, prompt included), and its tokens."""
    if config.stage.loop is Loop.reward_model:
        return "reward_model.max_length", config.reward_model.max_length
    if config.stage.loop not in GENERATING_LOOPS:
        return "sft.max_length", config.sft.max_length
    if config.stage.loop is Loop.evaluate:
        return "benchmark.max_tokens", config.benchmark.max_tokens
    if config.data.eval is not None and (config.evaluate.max_tokens or 0) > most_tokens(config)[1]:
        return "evaluate.max_tokens", config.evaluate.max_tokens or 0
    return most_tokens(config)


def value_at(config: Config, path: str) -> object:
    """The value of a field by its dotted path."""
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def check_bounds(config: Config, section: str = "") -> Iterator[Fault]:
    """Every number of one section, or of all, that lies out of its bounds."""
    for path, bounds in BOUNDS:
        value = value_at(config, path)
        if value is None or not path.startswith(section):
            continue
        assert isinstance(value, int | float), f"{path} is not a number"
        if not math.isfinite(value) or not all(_COMPARE[sign](value, bound) for sign, bound in bounds):
            wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds)
            yield Fault(path, str(value), f"must be {wanted}", f"set {path} accordingly")


def _check_run_dir(config: Config) -> Iterator[Fault]:
    if not config.run.dir:
        yield Fault("run.dir", "nothing", "must name a directory", "set run.dir=DIR")
        return
    path = Path(config.run.dir)
    if path.exists() and not path.is_dir():
        yield Fault("run.dir", str(path), "must be a directory", "choose another run.dir")
    elif (path / FILE_NAME).exists() and not (config.run.resume or config.run.resume_from):
        constraint = f"already holds a run ({FILE_NAME})"
        remedy = "go on with it (run.resume=true), choose another run.dir, or remove or rename the old one"
        yield Fault("run.dir", str(path), constraint, remedy)


def _check_checkpoint(config: Config) -> Iterator[Fault]:
    if not config.model.hf:
        made_from = f" (made from {config.model.base})" if config.model.base else ""
        remedy = f"set model.hf=DIR{made_from}"
        yield Fault("model.hf", "nothing", "must name a Hugging Face checkpoint directory", remedy)
        return
    directory = Path(config.model.hf)
    if not directory.is_dir():
        yield Fault("model.hf", str(directory), "must be a directory", "correct the path: model.hf=DIR")
        return
    if config.model.tokenizer is None:
        yield from check_tokenizer(directory, "model.hf")
    else:
        yield from check_tokenizer(Path(config.model.tokenizer), "model.tokenizer")
    if config.model.init is Init.load and not is_megatron(directory):  # whose index the late checks read
        yield from check_weights(directory, "model.hf")


def _check_device(config: Config, here: bool) -> Iterator[Fault]:
    if config.device.layer_spec is LayerSpec.te:
        if config.device.type is DeviceType.cpu:
            yield Fault("device.layer_spec", "te", "Transformer Engine needs a GPU", "use device.layer_spec=torch")
        elif here and _is_absent(config, "transformer_engine"):
            remedy = "install the gpu extra (pip install -e '.[gpu]') or use device.layer_spec=torch"
            yield Fault("device.layer_spec", "te", "transformer_engine is not installed", remedy)
    yield from _check_gpu_only(config, here)


def _is_absent(config: Config, package: str) -> bool:
    """Whether a package is not installed; what the container of a Slurm job holds is not to be seen from here."""
    in_container = config.cluster.scheduler is Scheduler.slurm and config.slurm.container_image is not None
    return not in_container and importlib.util.find_spec(package) is None


def _check_gpu_only(config: Config, here: bool) -> Iterator[Fault]:
    """What was asked for and is not to be had here is refused, never left out in silence."""
    parallel, precision, device = config.parallel, config.precision, config.device
    wanted = [
        ("parallel.dispatcher", parallel.dispatcher is Dispatcher.flex, "deep_ep"),
        ("precision.moments", precision.moments is ParamDtype.bf16, "transformer_engine"),
        ("precision.fp8", precision.fp8 and not precision.emulate_fp8, "transformer_engine"),
        ("device.fuse_weight_gradients", device.fuse_weight_gradients, "apex"),
    ]
    for field, is_on, package in wanted:
        value = str(value_at(config, field)).lower()
        if is_on and device.type is DeviceType.cpu:
            yield Fault(field, value, "needs a GPU (device=cuda)", f"take {field} back to its default")
        elif is_on and here and _is_absent(config, package):
            yield Fault(field, value, f"{package} is not installed", f"install it, or take {field} back to its default")
    yield from check_dispatcher(config)
    yield from _check_fp8(config)
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        constraint = "parameters are gathered by the buckets gradients are reduced in"
        yield Fault("parallel.overlap_param_gather", "true", constraint, "set parallel.overlap_grad_reduce=true")


def _check_fp8(config: Config) -> Iterator[Fault]:
    precision, device = config.precision, config.device
    emulated = precision.emulate_fp8
    if precision.fp8 and not emulated and device.layer_spec is not LayerSpec.te:
        constraint = "its matrix products are Transformer Engine's"
        yield Fault("precision.fp8", "true", constraint, "set device.layer_spec=te or precision=bf16")
    if precision.fp8 and precision.params is not ParamDtype.bf16:
        remedy = f"use precision=fp8{'_emulated' if emulated else ''}"
        yield Fault("precision.params", "fp32", "FP8 training keeps its other numbers in bf16", remedy)
    if emulated and not precision.fp8:
        constraint = "nothing is in FP8 with precision.fp8=false"
        yield Fault("precision.emulate_fp8", "true", constraint, "use precision=fp8_emulated")
    if emulated and device.layer_spec is not LayerSpec.torch:
        constraint = f"emulated products are those of plain torch, and device.layer_spec={device.layer_spec}"
        remedy = "set device.layer_spec=torch, or use precision=fp8"
        yield Fault("precision.emulate_fp8", "true", constraint, remedy)
    if emulated and device.fuse_weight_gradients:
        constraint = "apex's kernel knows no emulated FP8"
        yield Fault("device.fuse_weight_gradients", "true", constraint, "set device.fuse_weight_gradients=false")


def _check_saving(config: Config) -> Iterator[Fault]:
    every, parts = config.checkpoint.every, config.algo.updates_per_round
    if config.stage.loop is Loop.rl and parts >= 1 and every >= 1 and every % parts:
        constraint = f"must be whole rounds of algo.updates_per_round={parts} updates"
        nearest = max(1, round(every / parts)) * parts
        yield Fault("checkpoint.every", str(every), constraint, f"use for example {nearest}")
    best, metric = config.checkpoint.keep_best, config.checkpoint.best_metric
    if best and not config.data.eval and metric.startswith("eval/"):
        yield Fault("checkpoint.keep_best", str(best), f"{metric} needs an evaluation", "set data.eval or keep_best=0")


def _check_data(config: Config, here: bool) -> Iterator[Fault]:
    data, loop = config.data, config.stage.loop
    wanted = {Loop.rl: DataFormat.qa, Loop.reject: DataFormat.qa, Loop.sft: DataFormat.sft}.get(loop)
    if wanted is not None and data.format is not wanted:
        remedy = f"use data={wanted.value}, or stage={'rl' if loop is Loop.sft else 'sft'}"
        yield Fault("data.format", data.format.value, f"stage.loop={loop.value} reads {wanted.value} rows", remedy)
    if here and not data.train and loop is not Loop.evaluate:
        yield Fault("data.train", "nothing", "must name a JSONL file", "set data.train=FILE.jsonl")
    if data.eval is not None and loop is Loop.sft:
        yield Fault("data.eval", data.eval, "stage.loop=sft has no held-out evaluation", "set data.eval=null")


def _check_optim(config: Config) -> Iterator[Fault]:
    optim = config.optim
    # The updates of a reward model follow from its rows, which are counted later.
    totals = {Loop.sft: ("sft.updates", config.sft.updates), Loop.reward_model: ("", optim.warmup_updates)}
    field, updates = totals.get(config.stage.loop, ("algo.updates", config.algo.updates))
    if optim.min_lr > optim.lr:
        constraint = f"must be at most optim.lr={optim.lr}"
        yield Fault("optim.min_lr", str(optim.min_lr), constraint, "lower optim.min_lr or raise optim.lr")
    if optim.warmup_updates > updates >= 1:
        constraint = f"must be at most {field}={updates}"
        yield Fault("optim.warmup_updates", str(optim.warmup_updates), constraint, "shorten the warm-up")


def _check_batch(config: Config) -> Iterator[Fault]:
    algo, dp, loop = config.algo, config.parallel.dp, config.stage.loop
    if loop in (Loop.reject, Loop.evaluate, Loop.reward_model):
        return  # nothing is trained on, or counted in check_reward_model
    if loop is not Loop.rl:
        yield from check_sft_batch(config)
        return
    num_samples, parts = algo.samples_per_round, algo.updates_per_round
    shown = f"questions_per_round={algo.questions_per_round} x group_size={algo.group_size} = {num_samples} samples"
    if num_samples % parts:
        constraint = f"must divide the round's {shown}"
        remedy = "change it or algo.questions_per_round"
        yield Fault("algo.updates_per_round", str(parts), constraint, remedy)
    elif num_samples // parts < dp:
        got = f"{num_samples // parts} samples an update ({shown}, {parts} updates)"
        constraint = f"must be at least parallel.dp={dp}: each replica needs a sample"
        yield Fault("algo.updates_per_round", got, constraint, "lower it or raise algo.questions_per_round")
    if algo.updates % parts:
        constraint = f"must be whole rounds of algo.updates_per_round={parts} updates"
        nearest = max(1, round(algo.updates / parts)) * parts
        yield Fault("algo.updates", str(algo.updates), constraint, f"use for example {nearest}")
    if algo.reference_refresh % parts:
        # The reference's log-probs are worked out once a round, before its first update.
        constraint = f"must be whole rounds of algo.updates_per_round={parts} updates"
        nearest = max(1, round(algo.reference_refresh / parts)) * parts
        yield Fault("algo.reference_refresh", str(algo.reference_refresh), constraint, f"use for example {nearest}")


def _check_lengths(config: Config) -> Iterator[Fault]:
    """The longest sequence must fit one micro-batch. (Evaluation only generates, so its length does not count here.)"""
    sft, data = config.sft, config.data
    if config.stage.loop in (Loop.reject, Loop.evaluate, Loop.reward_model):
        return
    if config.stage.loop is Loop.sft:
        section, field, got, longest = "sft", "sft.max_length", str(sft.max_length), sft.max_length
        limit = sft.max_tokens_per_micro_batch
    else:
        section, (field, response) = "algo", most_tokens(config)
        got = f"{response} after prompts of up to data.max_prompt_tokens={data.max_prompt_tokens}"
        longest, limit = data.max_prompt_tokens + response, config.algo.max_tokens_per_micro_batch
    if longest > limit:
        name = f"{section}.max_tokens_per_micro_batch"
        constraint = f"the longest sequence, {longest} tokens, must fit {name}={limit}"
        yield Fault(field, got, constraint, f"lower it or raise {name}")
