"""Rules between the processes of a run and the machines that it is planned for."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.choices import GENERATING_LOOPS, SAMPLING_LOOPS, DeviceType, EngineKind, Scheduler, Transport
from r1mega.config.faults import Fault
from r1mega.config.schema import Config


def server_ranks(config: Config) -> int:
    """Processes of all SGLang servers of the run; 0 where it has none."""
    if config.stage.loop not in GENERATING_LOOPS or config.rollout.engine is not EngineKind.sglang:
        return 0
    return config.rollout.engines * config.sglang.tp


def trainer_ranks(config: Config) -> int:
    """Training processes of the run; 0 where servers do all the work."""
    if config.stage.loop in SAMPLING_LOOPS and config.rollout.engine is EngineKind.sglang:
        return 0
    return config.parallel.world_size


def takes_turns(config: Config) -> bool:
    """Whether trainer and servers have the same accelerators, by turns."""
    return config.sglang.release or config.sglang.transport is Transport.ipc


def check_cluster(config: Config) -> Iterator[Fault]:
    """Every accelerator of an allocation has its process, and every process its accelerator; without accelerators, no
    more training processes than the machines take.

    Where the cluster is this machine, whatever it is (cluster=local), nothing is compared.
    """
    cluster, parallel = config.cluster, config.parallel
    sizes = (*(getattr(parallel, axis) for axis in ("tp", "cp", "pp", "dp")), cluster.nodes, cluster.gpus_per_node)
    is_exact = cluster.scheduler is Scheduler.slurm or (cluster.exact and config.device.type is DeviceType.cuda)
    if not is_exact or min(sizes) < 1:
        return
    trainers, servers = trainer_ranks(config), server_ranks(config)
    if config.device.type is DeviceType.cpu:
        if trainers <= cluster.num_gpus:
            return
        servers = 0  # they share its cores
    has_both = bool(trainers and servers)
    found = f"cluster.nodes={cluster.nodes} x cluster.gpus_per_node={cluster.gpus_per_node} = {cluster.num_gpus}"
    layout = f"tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {parallel.dp} = {trainers}"
    fleet = f"rollout.engines={config.rollout.engines} x sglang.tp={config.sglang.tp} = {servers}"
    if has_both and takes_turns(config):
        if servers > cluster.num_gpus:
            yield Fault("rollout.engines", fleet, f"must be at most the {found} GPUs", "use fewer or smaller servers")
        servers = 0
    if trainers + servers != cluster.num_gpus:
        got = " and servers of ".join(([layout] if trainers else []) + ([fleet] if servers else []))
        at_most = "at most " if config.device.type is DeviceType.cpu else ""
        constraint = f"must be {at_most}{found}, one process on each"
        if has_both and servers:
            constraint += " (trainer and servers have GPUs of their own, as sglang.release=false says)"
        field = "parallel.dp" if trainers else "rollout.engines"
        per_replica = parallel.world_size // parallel.dp
        rest = cluster.num_gpus - servers
        fits = trainers and rest > 0 and rest % per_replica == 0
        remedy = f"set parallel.dp={rest // per_replica}" if fits else "choose another layout or cluster"
        yield Fault(field, got, constraint, remedy)
    local_ranks = config.sglang.tp // max(1, config.sglang.nodes_per_engine)
    if server_ranks(config) and config.device.type is DeviceType.cuda and local_ranks > cluster.gpus_per_node:
        constraint = f"a machine has cluster.gpus_per_node={cluster.gpus_per_node}, and would hold {local_ranks} ranks"
        remedy = "raise sglang.nodes_per_engine, or lower sglang.tp"
        yield Fault("sglang.nodes_per_engine", str(config.sglang.nodes_per_engine), constraint, remedy)
