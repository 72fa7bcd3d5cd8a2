"""What would make a run fit: single changes and pairs of them, tried out, those first that cost least time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from r1mega.config.choices import (
    DataFormat,
    DeviceType,
    EngineKind,
    KvCacheDtype,
    LayerSpec,
    Loop,
    Mtp,
    ParamDtype,
    Recompute,
)
from r1mega.config.schema import Config
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout
from r1mega.plan.assess import Assessment, assess
from r1mega.plan.held import Table, table_of
from r1mega.plan.job import GIB, job_of
from r1mega.plan.validity import problems

Change = tuple[str, Callable[[Config], Config]]
_SHOWN = 6


@dataclass(frozen=True)
class Tried:
    """A change and what it makes of the run."""

    override: str
    result: Assessment


def suggestions(found: Assessment) -> list[str]:
    """Overrides that make it fit, by time; where none of them does, those that leave least to be found."""
    fields, table = found.fields, table_of(found.fields)
    changes = list(_changes(found.config))
    tried = [one for change in changes if (one := _try(found.config, fields, table, change)) is not None]
    fitting = [one for one in tried if one.result.fits]
    if not fitting:
        useful = [change for change in changes if any(one.override == change[0] for one in tried)]
        pairs = [_both(first, second) for first, second in combinations(useful, 2) if _differ(first, second)]
        more = [one for pair in pairs if (one := _try(found.config, fields, table, pair)) is not None]
        fitting = [one for one in more if one.result.fits]
        tried += more
    if fitting:
        fitting.sort(key=lambda one: (one.result.num_gpus, one.result.seconds_per_update))
        return [_said(found, one, "fits") for one in fitting[:_SHOWN]]
    tried.sort(key=lambda one: (len(one.result.misfits), -one.result.headroom()))
    better = [one for one in tried if one.result.headroom() > found.headroom()]
    return [_said(found, one, "does not fit yet") for one in better[:_SHOWN]]


def _said(before: Assessment, one: Tried, verdict: str) -> str:
    after = one.result
    change = after.seconds_per_update / before.seconds_per_update - 1
    return (
        f"{one.override}: {verdict}; {after.worst()[2] / GIB:.1f} GiB at most ({after.worst()[1]}), "
        f"{change:+.0%} time, {after.num_gpus} accelerators"
    )


def _try(config: Config, fields: HfFields, table: Table, change: Change) -> Tried | None:
    changed = change[1](config)
    layout = Layout.of(**changed.parallel.sizes())
    if problems(changed, fields, layout):
        return None
    held = table.held(layout, freezes_mtp=changed.model.mtp is Mtp.freeze)
    result = assess(changed, fields, held)
    return Tried(change[0], result)


def _both(first: Change, second: Change) -> Change:
    return f"{first[0]} {second[0]}", lambda config: second[1](first[1](config))


def _differ(first: Change, second: Change) -> bool:
    """Whether two changes set other fields."""
    return not {part.partition("=")[0] for part in first[0].split()} & {
        part.partition("=")[0] for part in second[0].split()
    }


def _longest(config: Config) -> int:
    """Tokens of what has to fit a micro-batch: a sequence, of a reward model's pairs both of them."""
    job, pairs = job_of(config), config.data.format is DataFormat.pairs
    return job.longest * (2 if config.stage.loop is Loop.reward_model and pairs else 1)


def _changes(config: Config) -> Iterator[Change]:
    if config.stage.loop in (Loop.reject, Loop.evaluate):
        yield from _of_servers(config)
    else:
        yield from _of_training(config)


def _of_training(config: Config) -> Iterator[Change]:
    memory, parallel = config.memory, config.parallel
    if memory.recompute is not Recompute.full:
        yield _set("memory", recompute=Recompute.full)
    if not memory.offload and config.stage.loop is Loop.rl and config.rollout.max_staleness == 0:
        yield _set("memory", offload=True)
    if memory.logprob_chunk_tokens > 256:
        yield _set("memory", logprob_chunk_tokens=memory.logprob_chunk_tokens // 4)
    if config.precision.params is ParamDtype.fp32:
        yield _set("precision", params=ParamDtype.bf16)
    elif config.precision.moments is ParamDtype.fp32 and config.device.type is DeviceType.cuda:
        yield _set("precision", moments=ParamDtype.bf16)
    if config.device.layer_spec is LayerSpec.torch and config.device.type is DeviceType.cuda:
        yield _set("device", layer_spec=LayerSpec.te)
    if config.checkpoint.every and not parallel.overlap_grad_reduce:  # optimizer state is gathered by bucket
        yield _set("parallel", overlap_grad_reduce=True)
    section = {Loop.sft: "sft", Loop.reward_model: "reward_model"}.get(config.stage.loop, "algo")
    limit, longest = getattr(config, section).max_tokens_per_micro_batch, _longest(config)
    if limit // 2 >= longest:
        yield _set(section, max_tokens_per_micro_batch=limit // 2)
    if longest < limit and limit // 2 < longest:
        yield _set(section, max_tokens_per_micro_batch=longest)
    for factor in (2, 4):
        yield _more_machines(config, factor)
        if parallel.dp % factor == 0:
            for axis in ("tp", "cp", "pp"):
                sizes = {axis: getattr(parallel, axis) * factor, "dp": parallel.dp // factor}
                if axis == "pp":
                    sizes["stages"] = None
                yield _set("parallel", **sizes)
    if config.stage.loop is Loop.rl:
        yield from _of_servers(config)


def _of_servers(config: Config) -> Iterator[Change]:
    sglang = config.sglang
    if config.rollout.engine is EngineKind.sglang:
        yield _wider_servers(config)
        if sglang.kv_cache_dtype is KvCacheDtype.auto and config.device.type is DeviceType.cuda:
            yield _set("sglang", kv_cache_dtype=KvCacheDtype.fp8_e4m3)
        for fraction in (0.7, 0.6, 0.9):
            yield _set("sglang", memory_fraction=fraction)
        if not sglang.release and config.stage.loop is Loop.rl:
            yield _set("sglang", release=True)


def _more_machines(config: Config, factor: int) -> Change:
    dp, nodes = config.parallel.dp * factor, config.cluster.nodes * factor
    grown = _both(_set("parallel", dp=dp), _set("cluster", nodes=nodes))
    if config.rollout.engine is EngineKind.sglang and config.stage.loop is Loop.rl:
        return _both(grown, _set("rollout", engines=config.rollout.engines * factor))
    return grown


def _wider_servers(config: Config) -> Change:
    """Half as many of twice the ranks; experts and their copies together stay what `ep` divides."""
    sglang = config.sglang
    wider = _set(
        "sglang",
        tp=sglang.tp * 2,
        ep=sglang.ep * 2 if sglang.ep > 1 else 1,
        redundant_experts=sglang.redundant_experts * 2,
        nodes_per_engine=max(sglang.nodes_per_engine, -(-sglang.tp * 2 // config.cluster.gpus_per_node)),
    )
    return _both(wider, _set("rollout", engines=max(1, config.rollout.engines // 2)))


def _set(section: str, **values: object) -> Change:
    shown = {name: "null" if value is None else str(value).lower() for name, value in values.items()}
    override = " ".join(f"{section}.{name}={value}" for name, value in shown.items())
    return override, lambda config: replace(config, **{section: replace(getattr(config, section), **values)})
