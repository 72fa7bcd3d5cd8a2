"""A configuration, its model, and what ranks hold of it -> memory of every phase, times, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from r1mega.config.check_cluster import takes_turns
from r1mega.config.check_reward_model import MODELS
from r1mega.config.choices import EngineKind, Transport
from r1mega.config.schedule import has_preferences
from r1mega.config.schema import Config
from r1mega.models.hf_fields import HfFields
from r1mega.models.size import model_shape
from r1mega.parallel.layout import Layout
from r1mega.plan import job as jobs
from r1mega.plan import validity
from r1mega.plan.activations import Layers
from r1mega.plan.engine import Engine
from r1mega.plan.held import Held, table_of
from r1mega.plan.job import GIB, Job
from r1mega.plan.memory import Bytes, StageMemory
from r1mega.plan.speed import Generation, Seconds, Speed


@dataclass(frozen=True)
class RankPlan:
    """One distinct coordinate: its ranks, what they hold, and the bytes of each phase by what takes them."""

    held: Held
    coordinate: dict[str, int]
    first_rank: int
    num_ranks: int
    parameter_bytes: int
    phases: dict[str, Bytes]
    host: Bytes
    checkpoint_host: Bytes

    def peak(self, phase: str) -> float:
        """Bytes of a phase at its worst instant, by torch's count."""
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class EnginePlan:
    """The engines: memory of one rank, in bytes, and how they generate."""

    engine: Engine
    count: int
    shares_devices: bool
    weights: float
    cache: float
    generation: Generation

    @property
    def num_gpus(self) -> int:
        return self.engine.tp * self.count


@dataclass
class Assessment:
    """All that is known of a run before it starts. `misfits` says what does not fit, in words; empty: it fits.

    Where engines do all the work there are no `ranks` and no times of training.
    """

    config: Config
    fields: HfFields
    layout: Layout
    job: Job
    ranks: list[RankPlan]
    engines: EnginePlan | None
    micro_batches: int
    train_seconds: Seconds
    phase_seconds: Seconds
    flops_per_update: float
    traffic: dict[str, float]
    disk: dict[str, float]
    conversion_bytes: float
    misfits: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.misfits

    @property
    def seconds_per_update(self) -> float:
        """Of training, and an update's part of all else that a round takes."""
        return sum(self.train_seconds.values()) + sum(self.phase_seconds.values()) / self.job.updates_per_round

    @property
    def num_gpus(self) -> int:
        """Accelerators asked for."""
        engines = self.engines
        beside = 0 if engines is None or engines.shares_devices else engines.num_gpus
        return beside + (self.layout.world_size if self.ranks else 0)

    def device_peak(self, rank: RankPlan, phase: str) -> float:
        """Bytes of the device in a phase: torch's worst instant with its allocator's slack, and what is outside."""
        plan = self.config.plan
        own = rank.peak(phase) * (1 + plan.allocator_slack) + plan.overhead_gib * GIB
        return own + self._engine_bytes(phase)

    def engine_peak(self) -> float:
        """Bytes of the device of an engine's rank that shares it with nothing: weights, cache, what is outside."""
        engines = self.engines
        return 0.0 if engines is None else engines.weights + engines.cache + self.config.plan.overhead_gib * GIB

    def worst(self) -> tuple[RankPlan | None, str, float]:
        """The rank and the phase that take most of a device; no rank where engines do all the work."""
        if not self.ranks:
            return None, "generation", self.engine_peak()
        return max(
            ((rank, phase, self.device_peak(rank, phase)) for rank in self.ranks for phase in rank.phases),
            key=lambda found: found[2],
        )

    def headroom(self) -> float:
        """Bytes of a device that are left at the worst instant of all phases."""
        return self.config.cluster.gpu_memory_gib * GIB - self.worst()[2]

    def host_bytes(self) -> float:
        """Of the machine that keeps most in host memory, all of its processes together."""
        per_node = min(self.config.cluster.gpus_per_node, self.num_gpus)
        if not self.ranks:
            return per_node * self.config.plan.host_overhead_gib * GIB
        per_node = min(per_node, self.layout.world_size)
        kept = max(sum(rank.host.values()) for rank in self.ranks)
        if self.config.checkpoint.every:
            kept = max(kept, max(_kept_with(rank) for rank in self.ranks))
        return per_node * (kept + self.config.plan.host_overhead_gib * GIB)

    def _engine_bytes(self, phase: str) -> float:
        """Of the engine that shares the device."""
        engines = self.engines
        if engines is None or not engines.shares_devices:
            return 0.0
        released = self.config.sglang.release and self.config.rollout.engine is EngineKind.sglang
        if phase == "rollout" or not released:
            return engines.weights + engines.cache
        return engines.weights if phase in ("publish", "checkpoint") else 0.0


def _kept_with(rank: RankPlan) -> float:
    """Host memory while a checkpoint is written, beside pinned copies that are out of use and yet held."""
    pinned = {name: size for name, size in rank.host.items() if name != "reference"}
    return sum(rank.checkpoint_host.values()) + sum(pinned.values())


def assess(config: Config, fields: HfFields, held: list[Held]) -> Assessment:
    """Memory and time of a sound configuration. `held` is what one rank of each stage holds; not asked where nothing is
    trained."""
    layout = Layout.of(**config.parallel.sizes())
    job, compute, states = jobs.job_of(config), jobs.compute_of(config), jobs.states_of(config)
    layers = Layers(fields, layout, compute)
    speed = Speed(config, fields, layout, job, model_shape(fields), held)
    pack, further = job.worst_pack(layout), jobs.trains_mtp(config, fields)
    frozen = _frozen(config, fields, layout) if job.trains else {}
    ranks = [
        _rank(
            config,
            StageMemory(part, layers, states, pack, speed.micro_batches, trains_mtp=further),
            job,
            [states.params * own[part.stage].parameters + 4.0 * own[part.stage].gate_biases for own in frozen.values()],
        )
        for part in (held if job.trains else ())
    ]
    engines = _engines(config, fields, speed)
    found = Assessment(
        config=config,
        fields=fields,
        layout=layout,
        job=job,
        ranks=ranks,
        engines=engines,
        micro_batches=speed.micro_batches,
        train_seconds=speed.train() if job.trains else {},
        phase_seconds=_phases(config, job, speed, engines),
        flops_per_update=speed.flops_per_update(),
        traffic=speed.traffic() if job.trains else {},
        disk={"checkpoint_bytes": speed.checkpoint_bytes(), "export_bytes": speed.export_bytes()} if job.trains else {},
        conversion_bytes=speed.conversion_bytes(),
    )
    found.misfits = _misfits(found)
    return found


def _frozen(config: Config, fields: HfFields, layout: Layout) -> dict[str, list[Held]]:
    """What one rank of each stage holds of each reward model that the run asks."""
    asked = validity.asked_models(config, fields)
    return {name: table_of(own).held(layout, freezes_mtp=False) for name, own in asked.items()}


def _rank(config: Config, memory: StageMemory, job: Job, frozen: list[float]) -> RankPlan:
    """`frozen` are the bytes of the weights of each reward model that is asked."""
    layout, held = memory.layout, memory.held
    first = held.stage * layout.per_stage
    at = layout.coordinate(first)
    phases = {"train": memory.train()}
    if job.is_rl:
        if job.has_anchor:
            phases["logprobs"] = memory.logprobs()
        if job.has_reference:
            phases["reference"] = memory.logprobs(reference=True)
        if frozen:
            phases["reward models"] = memory.reward_models(max(frozen))
        phases["publish"] = memory.publish(_bucket_bytes(config))
        phases["rollout"] = memory.rollout()
    if config.checkpoint.every:
        phases["checkpoint"] = memory.checkpoint(has_reference=job.is_rl, overlaps=config.parallel.overlap_grad_reduce)
    return RankPlan(
        held=held,
        coordinate={"pp": at.pp, "tp": at.tp, "cp": at.cp, "dp": at.dp, "ep": at.ep, "etp": at.etp},
        first_rank=first,
        num_ranks=layout.per_stage,
        parameter_bytes=held.parameters * memory.states.params,
        phases=phases,
        host=memory.host(has_reference=job.is_rl, reward_models=sum(frozen)),
        checkpoint_host=memory.checkpoint_host(has_reference=job.is_rl),
    )


def _bucket_bytes(config: Config) -> float:
    """What leaves at once. Over `disk` a quarter of a bucket, in two turns; by handles what is sent, what comes and the
    parcel; over process groups two turns of what comes and what it is put together to (`weights.gathering`,
    `exchange`)."""
    if config.rollout.engine is EngineKind.embedded:
        return float(1 << 28) * 2
    size, transport = float(config.sglang.bucket_bytes), config.sglang.transport
    return size * {Transport.disk: 0.5, Transport.ipc: 3.0}.get(transport, 4.0)


def _engines(config: Config, fields: HfFields, speed: Speed) -> EnginePlan | None:
    engine, count = jobs.engine_of(config, fields), config.rollout.engines
    if engine is None:
        return None
    embedded = config.rollout.engine is EngineKind.embedded
    device, weights = config.cluster.gpu_memory_gib * GIB, engine.weights()
    shares = speed.job.trains and (embedded or takes_turns(config))
    if embedded:  # grows with what is decoded
        batch = min(config.rollout.max_batch, speed.job.samples_per_update * speed.job.updates_per_round / count)
        cache = batch * speed.job.longest * engine.cache_per_token()
    else:
        cache = device * config.sglang.memory_fraction - weights
        if config.sglang.max_cached_tokens:
            cache = min(cache, config.sglang.max_cached_tokens * engine.cache_per_token())
    generation = speed.generation(engine, count, max(cache, 0.0) / GIB)
    return EnginePlan(engine, count, shares, weights, max(cache, 0.0), generation)


def _phases(config: Config, job: Job, speed: Speed, engines: EnginePlan | None) -> Seconds:
    """Of a round, without its updates."""
    found: Seconds = {}
    if engines is not None and not job.trains:
        found["generation"] = speed.rollout(engines.generation, engines.engine, engines.count)
        return found
    if engines is not None:
        generation = engines.generation
        found["rollout"] = speed.rollout(generation, engines.engine, engines.count)
        found["logprobs"] = speed.logprobs(rounds=int(job.has_anchor) + int(job.has_reference))
        if asked := _share_of_scored(config, job):
            found["reward models"] = asked * speed.logprobs(rounds=1)
        found["publish"] = speed.publish(engines.engine, engines.count)
    if config.checkpoint.every:
        cluster = config.cluster
        seconds = speed.checkpoint_bytes() / (cluster.nodes * cluster.disk_gb_per_s * 1e9)
        found["checkpoint"] = seconds * job.updates_per_round / config.checkpoint.every
    return found


def _share_of_scored(config: Config, job: Job) -> float:
    """Share of all samples of the run that a reward model reads: each general one is one model's, by its domain."""
    if not any(getattr(config.reward, name) for name in MODELS):
        return 0.0
    starts = range(0, job.updates, job.updates_per_round)
    return config.data.general_share * sum(has_preferences(config, start) for start in starts) / len(starts)


def _misfits(found: Assessment) -> list[str]:
    cluster = found.config.cluster
    limit, said = cluster.gpu_memory_gib, []
    for phase in found.ranks[0].phases if found.ranks else ():
        rank = max(found.ranks, key=lambda rank: found.device_peak(rank, phase))
        needed = found.device_peak(rank, phase) / GIB
        if needed > limit:
            said.append(
                f"{phase}: pipeline stage {rank.held.stage} needs {needed:.1f} GiB of a device, which has {limit:g}"
            )
    if not found.ranks and found.engine_peak() / GIB > limit:
        said.append(f"generation: a rank needs {found.engine_peak() / GIB:.1f} GiB of a device, which has {limit:g}")
    said += _engine_misfits(found)
    host = found.host_bytes() / GIB
    if host > cluster.host_memory_gib:
        said.append(f"host memory: a machine needs {host:.0f} GiB and has {cluster.host_memory_gib:g}")
    if found.num_gpus > cluster.num_gpus:
        kinds = "training and engines beside it" if found.num_gpus > found.layout.world_size else "training"
        kinds = kinds if found.ranks else "engines"
        said.append(f"accelerators: {kinds} take {found.num_gpus}, and {cluster.num_gpus} are there")
    engines = found.engines
    if engines is not None and engines.shares_devices and engines.num_gpus > found.layout.world_size:
        said.append(
            f"accelerators: the servers take {engines.num_gpus}, and training, whose devices they share, has "
            f"{found.layout.world_size}"
        )
    return said


def _engine_misfits(found: Assessment) -> list[str]:
    engines, job = found.engines, found.job
    if engines is None or found.config.rollout.engine is EngineKind.embedded:
        return []
    room = found.config.cluster.gpu_memory_gib * GIB * found.config.sglang.memory_fraction
    if engines.weights > room:
        return [
            f"rollout: weights of {engines.weights / GIB:.1f} GiB on each rank of a server do not fit its share of a "
            f"device, {room / GIB:.1f} GiB"
        ]
    if engines.generation.cached_tokens < job.longest_generated:
        return [
            f"rollout: the cache of a server holds {engines.generation.cached_tokens:,.0f} tokens, the longest "
            f"sequence has {job.longest_generated:,}"
        ]
    return []
