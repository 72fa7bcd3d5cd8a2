"""What a Slurm job must keep: bounds always, and all else when a job is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from r1mega.config.choices import DeviceType, EngineKind, Loop, Scheduler
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

SLURM_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("slurm.signal_seconds", ((">=", 1),)),
    ("slurm.max_requeues", ((">=", 0),)),
    ("slurm.cpus_per_task", ((">=", 1),)),
    ("slurm.engine_nodes", ((">=", 0),)),
    ("slurm.min_disk_gib", ((">=", 0),)),
    ("slurm.rendezvous_minutes", ((">", 0),)),
    ("slurm.probe_seconds", ((">", 0),)),
)
# Minutes, minutes:seconds, hours:minutes:seconds, and each of the last two, or hours alone, after days (sbatch --time).
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_OWN = ("--nodes", "--ntasks-per-node", "--output", "--error", "--chdir", "--signal", "--requeue", "--no-requeue")
_OWN_SHORT = re.compile(r"-[NnoeDt]\b|-[NnoeDt]\d")


def check_slurm(config: Config) -> Iterator[Fault]:
    """Rules of the section besides the bounds, whatever starts the run."""
    slurm = config.slurm
    if slurm.time_limit is not None and not _TIME.fullmatch(slurm.time_limit):
        constraint = "must be a time as sbatch --time takes it"
        yield Fault("slurm.time_limit", slurm.time_limit, constraint, "write it as HOURS:MINUTES:SECONDS, quoted")
    for line in slurm.extra:
        if not line.startswith("-") or "\n" in line:
            constraint = "must be one option of sbatch"
            yield Fault("slurm.extra", line, constraint, "write it as --NAME=VALUE")
        elif line.split("=")[0].split()[0] in _OWN or _OWN_SHORT.match(line):
            remedy = "take it out of the list, and set the field that decides it"
            yield Fault("slurm.extra", line, "the job's script decides this one", remedy)
    for name in ("partition", "account", "qos", "container_image"):
        value = getattr(slurm, name)
        if value is not None and (not value or value.split() != [value]):
            yield Fault(f"slurm.{name}", repr(value), "must be one word", "write it without blanks, or leave it null")


def check_submit(config: Config) -> Iterator[Fault]:
    """What must hold besides when the run is to become a job."""
    if config.cluster.scheduler is not Scheduler.slurm:
        constraint = "r1mega submit makes a Slurm job"
        remedy = "choose a cluster=... under Slurm (or set cluster.scheduler=slurm), or use r1mega train"
        yield Fault("cluster.scheduler", str(config.cluster.scheduler), constraint, remedy)
    if config.stage.loop is Loop.reject:
        constraint = "a job starts training processes, and this loop has none"
        yield Fault("stage.loop", "reject", constraint, "start r1mega train with cluster=local inside an allocation")
    if re.search(r"[\s%\\\"'$`]", str(Path(config.run.dir).absolute())):
        constraint = "goes into a script and into Slurm's file names, where blanks, quotes, $, % and \\ are special"
        yield Fault("run.dir", config.run.dir, constraint, "choose another one")
    if config.slurm.requeue and config.checkpoint.every < 1:
        constraint = "a job that is requeued after a lost node goes on from a checkpoint"
        yield Fault("checkpoint.every", str(config.checkpoint.every), constraint, "set it, or slurm.requeue=false")
    yield from _check_size(config)
    yield from _check_engines(config)


def training_nodes(config: Config) -> int:
    """Machines that training processes run on: the job's first ones."""
    return config.cluster.nodes - config.slurm.engine_nodes


def ranks_per_node(config: Config) -> int:
    """Training processes of each of these machines."""
    return config.parallel.world_size // max(1, training_nodes(config))


def _check_size(config: Config) -> Iterator[Fault]:
    """The layout takes the machines that the job has, all of them alike."""
    cluster, world, nodes = config.cluster, config.parallel.world_size, training_nodes(config)
    if nodes < 1:
        constraint = f"must leave machines to the trainers: cluster.nodes={cluster.nodes}"
        yield Fault("slurm.engine_nodes", str(config.slurm.engine_nodes), constraint, "lower it or raise cluster.nodes")
        return
    shown = f"{world} training processes (parallel.tp x cp x pp x dp)"
    if world % nodes:
        remedy = "change parallel.dp, cluster.nodes or slurm.engine_nodes"
        yield Fault("parallel", shown, f"must be the same number on each of {nodes} machines", remedy)
    elif world // nodes > cluster.gpus_per_node:
        constraint = f"must be at most {nodes} machines x cluster.gpus_per_node={cluster.gpus_per_node}"
        yield Fault("parallel", shown, constraint, "lower parallel.dp, or raise cluster.nodes")
    elif world // nodes < cluster.gpus_per_node and config.device.type is DeviceType.cuda and not _has_servers(config):
        constraint = f"leaves accelerators of {nodes} machines x cluster.gpus_per_node={cluster.gpus_per_node} idle"
        yield Fault("parallel", shown, constraint, "raise parallel.dp, or lower cluster.nodes or cluster.gpus_per_node")


def _has_servers(config: Config) -> bool:
    return config.stage.loop is Loop.rl and config.rollout.engine is EngineKind.sglang


def _check_engines(config: Config) -> Iterator[Fault]:
    """Servers: the job knows its machines, and nobody else does."""
    slurm, sglang = config.slurm, config.sglang
    if not _has_servers(config):
        if slurm.engine_nodes:
            constraint = "only SGLang servers need machines of their own"
            yield Fault("slurm.engine_nodes", str(slurm.engine_nodes), constraint, "set it to 0, or use rollout=sglang")
        return
    if slurm.container_image is not None:
        constraint = "SGLang servers are started without a container only"
        yield Fault("slurm.container_image", slurm.container_image, constraint, "set it to null, or rollout=embedded")
    for name in ("hosts", "remote"):
        if value := getattr(sglang, name):
            constraint = "is filled in by the job, whose machines nobody knows before"
            yield Fault(f"sglang.{name}", str(value), constraint, "leave it out; slurm.engine_nodes says how many")
    if config.cluster.nodes > 1 and str(sglang.transport) == "ipc":
        constraint = "handles of memory go to processes of the same machine, and the job has several"
        yield Fault("sglang.transport", "ipc", constraint, "use disk or nccl")
    if sglang.nodes_per_engine < 1 or sglang.tp % sglang.nodes_per_engine:
        return  # check_engines says so
    each = sglang.tp // sglang.nodes_per_engine
    nodes = slurm.engine_nodes or config.cluster.nodes
    slots = nodes * (max(0, config.cluster.gpus_per_node - sglang.first_gpu) // each)
    wanted = config.rollout.engines * sglang.nodes_per_engine
    if wanted > slots:
        got = f"{config.rollout.engines} servers x sglang.nodes_per_engine={sglang.nodes_per_engine}"
        constraint = f"{nodes} machines have room for {slots} server processes of {each} accelerators"
        yield Fault("rollout.engines", got, constraint, "lower it, or raise slurm.engine_nodes or cluster.nodes")
