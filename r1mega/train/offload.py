"""Gradients and optimizer state out of the accelerator's memory while something else needs it.

The tensors stay the same objects: their storage is emptied, and filled again before they are used. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer


class Offload:
    """What of a wrapped model and its optimizer is in host memory at the moment.

    Gradients are not kept: between updates they are nothing. Optimizer state that shares memory with the model's
    parameters (fp32 training without master weights of its own) stays.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._host: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._grad_bytes: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def is_out(self) -> bool:
        """Whether the tensors are in host memory."""
        return bool(self._host or self._grad_bytes)

    @torch.no_grad()
    def move_out(self) -> int:
        """Empty the storages; returns the bytes freed on the device."""
        if self.is_out:
            return 0
        for storage in self._gradient_storages():
            self._grad_bytes.append((storage, storage.nbytes()))
            storage.resize_(0)
        for tensor in self._state_tensors():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._host.append((tensor, host.copy_(tensor)))
            tensor.untyped_storage().resize_(0)
        return sum(size for _, size in self._grad_bytes) + sum(host.nbytes for _, host in self._host)

    @torch.no_grad()
    def move_back(self) -> None:
        """Fill the storages again, the gradients with zeros."""
        for storage, size in self._grad_bytes:
            storage.resize_(size)
            storage.fill_(0)
        for tensor, host in self._host:
            tensor.untyped_storage().resize_(host.nbytes)
            tensor.copy_(host)
        self._grad_bytes, self._host = [], []

    def _gradient_storages(self) -> Iterator[torch.UntypedStorage]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data.untyped_storage()

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        """Master weights and moments, each with a storage to itself."""
        parameters = (parameter for chunk in self._chunks for parameter in chunk.module.parameters())
        taken = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        for optimizer in (part.optimizer for part in self._optimizer.chained_optimizers):
            groups = (parameter for group in optimizer.param_groups for parameter in group["params"])
            for parameter in groups:
                for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
                    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
                        continue
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in taken and storage.nbytes() == tensor.nbytes:
                        taken.add(storage.data_ptr())
                        yield tensor
