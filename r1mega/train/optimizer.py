"""Megatron's distributed data parallel wrapper and distributed Adam, from plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from r1mega.parallel.groups import Groups


@dataclass(frozen=True)
class AdamSettings:
    """AdamW. Norms and biases take no weight decay. `clip_grad` 0 means no clipping."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    moments: torch.dtype = torch.float32
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


def wrap(
    chunks: Sequence[torch.nn.Module], groups: Groups, settings: AdamSettings, before_reduction: Callable[[], None]
) -> list[DistributedDataParallel]:
    """DDP whose gradients are fp32 sums, reduce-scattered to the ranks that hold each part of the optimizer's state.

    `before_reduction` is called when the last backward pass of an update is done: Megatron forgets some counts then.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    model_config = chunks[0].config
    wrapped = [
        DistributedDataParallel(model_config, config, chunk, pg_collection=groups.collection) for chunk in chunks
    ]

    def finalize(chunks: list[torch.nn.Module], _num_tokens: Any = None, **kwargs: Any) -> None:
        before_reduction()
        # The loss is already divided by the global count: nothing is left to scale.
        finalize_model_grads(chunks, None, **kwargs)

    model_config.finalize_model_grads_func = finalize
    if settings.overlap_grad_reduce:
        # Only the last micro-batch's backward pass starts the reductions.
        contexts = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = contexts[0] if len(wrapped) == 1 else contexts
    return wrapped


def make_optimizer(wrapped: Sequence[DistributedDataParallel], settings: AdamSettings) -> MegatronOptimizer:
    """Distributed Adam with fp32 master weights and moments."""
    dtype = wrapped[0].module.config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=settings.overlap_param_gather,
        use_precision_aware_optimizer=settings.moments != torch.float32,
        exp_avg_dtype=settings.moments,
        exp_avg_sq_dtype=settings.moments,
        barrier_with_L1_time=False,
    )
    return get_megatron_optimizer(config, list(wrapped), use_gloo_process_groups=False)


def full_gradients(chunks: Sequence[DistributedDataParallel]) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Each local parameter's whole reduced gradient, fp32. Collective over the data-parallel groups.

    After the reduce-scatter a rank's gradient buffer is valid only in its own shard; the shards are put together here.
    Call between the backward pass and the optimizer step.
    """
    for buffer in [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]:
        group = buffer.data_parallel_group
        size = group.size()
        if size == 1:
            continue
        for bucket in buffer.buckets:
            numel = bucket.grad_data.numel() // size
            shard = bucket.grad_data[group.rank() * numel : (group.rank() + 1) * numel].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    parameters = [parameter for chunk in chunks for parameter in chunk.module.parameters()]
    return {parameter: parameter.main_grad.detach().clone() for parameter in parameters if parameter.requires_grad}
