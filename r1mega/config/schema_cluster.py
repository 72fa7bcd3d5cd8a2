"""Fields of the machines a run is planned for and started on: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.choices import Scheduler


@dataclass
class ClusterConfig:
    scheduler: Scheduler = Scheduler.local
    """What starts processes: `local`, this machine, or `slurm` (`r1mega submit`)."""
    nodes: int = 1
    """Number of machines."""
    exact: bool = False
    """A run on GPUs must fill these machines with its processes, no more and no fewer; under Slurm it always must."""
    gpus_per_node: int = 1
    """Accelerators of each, one training process on each; on CPU the training processes of each machine."""
    gpu_memory_gib: float = 80.0
    """Memory of one accelerator (H100: 80)."""
    gpu_bf16_tflops: float = 989.0
    """Dense bf16 matrix products of one accelerator in 1e12 FLOP/s (H100 SXM data sheet: 989)."""
    gpu_fp8_tflops: float = 1979.0
    """Dense FP8 matrix products of one accelerator in 1e12 FLOP/s (H100 SXM data sheet: 1979)."""
    gpu_memory_gb_per_s: float = 3350.0
    """Memory bandwidth of one accelerator in 1e9 bytes/s (H100 SXM data sheet: 3350)."""
    node_gb_per_s: float = 450.0
    """One accelerator to its neighbours in the machine, in 1e9 bytes/s each way (H100 NVLink data sheet: 450)."""
    network_gb_per_s: float = 50.0
    """One accelerator to other machines, in 1e9 bytes/s each way (one 400 Gb/s adapter each: 50)."""
    host_memory_gib: float = 2048.0
    """Memory of one machine (ours)."""
    disk_gb_per_s: float = 2.0
    """What one machine writes to the shared file system, in 1e9 bytes/s (ours)."""

    @property
    def num_gpus(self) -> int:
        """Accelerators of all machines."""
        return self.nodes * self.gpus_per_node
