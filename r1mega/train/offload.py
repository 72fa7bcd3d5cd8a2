"""Weights, gradients and optimizer state out of the accelerator's memory while something else needs it.

The tensors stay the same objects: their storages are emptied, and filled again before they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer


class Offload:
    """What of a wrapped model and its optimizer is in host memory at the moment.

    Gradients are not kept: between updates they are nothing.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []  # emptied, its copy on the host
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []  # emptied, its bytes

    @property
    def is_out(self) -> bool:
        """Whether the tensors are in host memory."""
        return bool(self._kept or self._dropped)

    def move_out(self) -> int:
        """Empty the storages; returns the bytes freed on the device."""
        if self.is_out:
            return 0
        for storage in self._gradient_storages():
            self._dropped.append((storage, storage.nbytes()))
        for storage in self._kept_storages():
            host = torch.UntypedStorage(storage.nbytes())
            if storage.device.type == "cuda":
                host = host.pin_memory()
            host.copy_(storage)
            self._kept.append((storage, host))
        for storage, _ in (*self._dropped, *self._kept):
            storage.resize_(0)
        return sum(size for _, size in self._dropped) + sum(host.nbytes() for _, host in self._kept)

    def move_back(self) -> None:
        """Fill the storages again, the gradients with zeros."""
        for storage, size in self._dropped:
            storage.resize_(size)
            storage.fill_(0)
        for storage, host in self._kept:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._dropped, self._kept = [], []

    def _gradient_storages(self) -> Iterator[torch.UntypedStorage]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data.untyped_storage()

    def _kept_storages(self) -> Iterator[torch.UntypedStorage]:
        """Of the model's parameters (many share one), of master weights and of moments, each once."""
        seen: set[int] = set()
        for tensor in self._kept_tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage

    def _kept_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self._chunks:
            yield from chunk.module.parameters()
        for optimizer in (part.optimizer for part in self._optimizer.chained_optimizers):
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                state = optimizer.state.get(parameter, {}).values()
                yield parameter
                yield from (value for value in state if isinstance(value, torch.Tensor) and value.dim() > 0)
