"""The process groups of a run. The only file that touches Megatron's `parallel_state`.

Everything else is handed the groups it needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from r1mega.parallel import device as devices
from r1mega.parallel import shared_gpu
from r1mega.parallel.layout import Coordinate, Layout


@dataclass(frozen=True)
class Groups:
    """What one rank knows of the others. `collection` is Megatron's ProcessGroupCollection of the same groups."""

    layout: Layout
    rank: int
    coordinate: Coordinate
    device: torch.device
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    stage: dist.ProcessGroup  # all ranks of this pipeline stage: tp x cp x dp
    collection: object
    control: dist.ProcessGroup  # gloo over all ranks, for objects and flags even where tensors go by NCCL

    @property
    def is_first_stage(self) -> bool:
        return self.coordinate.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinate.pp == self.layout.pp - 1

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this rank reports what all ranks of its pipeline stage know alike."""
        return self.coordinate.tp == 0 and self.coordinate.cp == 0 and self.coordinate.dp == 0

    @property
    def speaks_for_loss(self) -> bool:
        """Whether this rank reports the loss of its data-parallel part: its tp and cp neighbours have the same."""
        return self.is_last_stage and self.coordinate.tp == 0 and self.coordinate.cp == 0


def initialize(
    layout: Layout,
    device_type: str,
    *,
    seed: int,
    timeout_minutes: float,
    threads: int = 1,
    share_gpu: bool = False,
) -> Groups:
    """Join the world given by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and cut it into groups.

    Every collective carries `timeout_minutes`, so that a rank that is gone ends the run instead of hanging it. After
    `release` the same processes may call it again, to be cut in another way. With `share_gpu` the ranks of a node share
    its GPUs and exchange through the host (`parallel.shared_gpu`).

    Raises:
        ValueError: the world's size is not the layout's, or the device is not there.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != layout.world_size:
        raise ValueError(f"WORLD_SIZE: got {world_size}; layout {layout} needs {layout.world_size} processes")
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = devices.prepare(device_type, local_rank, threads, share_gpu=share_gpu)
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        store = _meet(rank, world_size, timeout)
        backend = shared_gpu.register() if share_gpu else devices.backend(device_type)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout) if device_type == "cuda" else dist.group.WORLD
    _cut(layout, seed=seed, timeout_minutes=timeout_minutes)
    return _groups(layout, rank, device, control)


def _meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, when all ranks have come to it.

    R1MEGA_RENDEZVOUS_SECONDS, where a launcher sets it, is how long slow machines are waited for; what follows is under
    `timeout`. Raises torch's DistStoreError, which says how many have come, or DistNetworkError.
    """
    patience = float(os.environ.get("R1MEGA_RENDEZVOUS_SECONDS", timeout.total_seconds()))
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=patience)))
    store.set_timeout(timeout)
    return store


def meet(*, timeout_minutes: float) -> dist.ProcessGroup:
    """Join the world as `initialize` does, for processes that exchange objects and nothing else: gloo, and no cut.

    Megatron is not needed. `part` leaves it.
    """
    dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))
    return dist.group.WORLD


def part() -> None:
    """Leave a world that `meet` joined."""
    dist.destroy_process_group()


def imagine(layout: Layout, rank: int) -> Groups:
    """What `initialize` gives this rank of a world of any size, in one process and with nobody to talk to.

    Models can be built and asked for their parameters; a collective returns at once and moves nothing. `shutdown` ends
    the world, and another may be imagined after it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = devices.prepare("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    _cut(layout, seed=0, timeout_minutes=1)
    return _groups(layout, rank, device, dist.group.WORLD)


def _cut(layout: Layout, *, seed: int, timeout_minutes: float) -> None:
    """Have Megatron cut the world into the layout's groups."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def _groups(layout: Layout, rank: int, device: torch.device, control: dist.ProcessGroup) -> Groups:
    """Megatron's groups of this rank, after checking that our coordinates are Megatron's."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    coordinate = layout.coordinate(rank)
    assert coordinate.tp == parallel_state.get_tensor_model_parallel_rank()
    assert coordinate.cp == parallel_state.get_context_parallel_rank()
    assert coordinate.pp == parallel_state.get_pipeline_model_parallel_rank()
    assert coordinate.dp == parallel_state.get_data_parallel_rank()
    assert coordinate.ep == parallel_state.get_expert_model_parallel_rank()
    assert coordinate.etp == parallel_state.get_expert_tensor_parallel_rank()
    return Groups(
        layout=layout,
        rank=rank,
        coordinate=coordinate,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        stage=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        control=control,
    )


def release() -> None:
    """Undo the cut, but stay in the world. Each group has threads and sockets of its own: they end here."""
    from megatron.core import parallel_state

    made = list(parallel_state._global_process_group_list or ())
    parallel_state.destroy_model_parallel()
    for group in made:
        if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def shutdown() -> None:
    """Leave the world; safe to call when it was never joined."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
