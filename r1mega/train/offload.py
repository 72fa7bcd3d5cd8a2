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
        # Emptied storages with their copies on the host: the model's weights; what only an update needs.
        self._weights: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._states: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []  # emptied, its bytes

    def move_out(self, *, keeps_weights: bool = False) -> int:
        """Empty the storages that are not yet empty, but for the weights where those are kept; returns the bytes that
        this freed on the device."""
        freed = 0
        for storage in self._gradient_storages():
            if storage.nbytes():
                self._dropped.append((storage, storage.nbytes()))
                freed += storage.nbytes()
                storage.resize_(0)
        weights = _distinct(self._weight_tensors())
        states = [found for pointer, found in _distinct(self._state_tensors()).items() if pointer not in weights]
        for storage in states:
            freed += _empty(storage, self._states)
        if not keeps_weights:
            for storage in weights.values():
                freed += _empty(storage, self._weights)
        torch.cuda.empty_cache()  # what torch keeps for itself no other process can have
        return freed

    def move_back(self, *, only_weights: bool = False) -> None:
        """Fill the storages again, the gradients with zeros; or only those of the weights."""
        _fill(self._weights)
        if only_weights:
            return
        for storage, size in self._dropped:
            storage.resize_(size)
            storage.fill_(0)
        self._dropped.clear()
        _fill(self._states)

    def _gradient_storages(self) -> Iterator[torch.UntypedStorage]:
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data.untyped_storage()

    def _weight_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self._chunks:
            yield from chunk.module.parameters()

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        """Master weights, which in fp32 share the storages of the weights, and moments."""
        for optimizer in (part.optimizer for part in self._optimizer.chained_optimizers):
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                state = optimizer.state.get(parameter, {}).values()
                yield parameter
                yield from (value for value in state if isinstance(value, torch.Tensor) and value.dim() > 0)


def _distinct(tensors: Iterator[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages that hold something, each once (many parameters share one), by their address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _empty(storage: torch.UntypedStorage, kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> int:
    host = torch.UntypedStorage(storage.nbytes())
    if storage.device.type == "cuda":
        host = host.pin_memory()
    host.copy_(storage)
    kept.append((storage, host))
    storage.resize_(0)
    return host.nbytes()


def _fill(kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
    for storage, host in kept:
        storage.resize_(host.nbytes())
        storage.copy_(host)
    kept.clear()
