"""Fields of a Slurm job: see schema.py. Nothing here decides what a run computes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlurmConfig:
    partition: str | None = None
    """Partition (sbatch --partition); null leaves it to the cluster, as with account and qos."""
    account: str | None = None
    """Account that is charged (sbatch --account)."""
    qos: str | None = None
    """Quality of service (sbatch --qos)."""
    time_limit: str | None = None
    """Longest time of one start, as sbatch --time takes it, such as `24:00:00`; null: the partition's. A run that needs
    longer is requeued."""
    signal_seconds: int = 1800
    """So long before the time limit the run is asked to stop. It has to last for one round and a checkpoint; Slurm may
    ask up to a minute earlier (ours)."""
    requeue: bool = True
    """Queue the job again when the time limit, a preemption or a lost node has ended it; the run goes on from there."""
    max_requeues: int = 100
    """Starts after the first; then the job ends instead (ours)."""
    exclusive: bool = True
    """Ask for whole machines: --exclusive and all their memory."""
    gpu_request: str = "--gpus-per-node={count}"
    """How cluster.gpus_per_node accelerators are asked for with device=cuda; another way is `--gres=gpu:{count}`."""
    cpus_per_task: int | None = None
    """CPUs of each training process; null: processes are bound to none."""
    engine_nodes: int = 0
    """Machines, the last ones of the job, for SGLang servers alone; 0: servers share the machines of the trainers."""
    network_interface: str | None = None
    """Interface of the trainers' first contact (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); null: found by host name."""
    rendezvous_minutes: float = 30.0
    """Training processes wait so long for the last of them to be there: images and modules load slowly (ours)."""
    probe_seconds: float = 60.0
    """After a failure a machine that does not start a command within this counts as lost, and the job is requeued
    instead of failing (ours)."""
    health_check: bool = True
    """Begin with slurm/health_check.sh on each machine; what it finds ends the job before a process starts."""
    min_disk_gib: float = 10.0
    """Free space that the health check wants where run.dir is (ours)."""
    python: str | None = None
    """Python of the job; null: the one that submits. It has to be there on all machines."""
    container_image: str | None = None
    """Image of the training processes for pyxis, `/path/image.sqsh` or `registry#name:tag`; null: no container. What
    starts and watches them stays outside, where Slurm's commands are."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts of it, HOST:CONTAINER each; run.dir, model and data need to be among them, under the same paths."""
    container_python: str = "python"
    """Python inside the image that has r1mega (slurm/Dockerfile installs it)."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before anything else in the job, such as `module load cuda`."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, one each, such as `--constraint=h100`."""
