"""DeepEP's interface over torch's collectives, as far as Megatron-Core 0.16.1's flex dispatcher asks for it.

DeepEP's kernels need GPUs that see each other by NVLink. What Megatron does with them does not: with this in their
place the flex dispatcher runs anywhere, over gloo. Restated from DeepEP 1.2.1 (`deep_ep/buffer.py`); unlike its
kernels, which add up bf16 alone, this takes any dtype.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config.check_dispatcher import DEEP_EP_RANKS


class EventHandle:
    """A point in a stream; on a host everything before it is done."""


class EventOverlap:
    """What waits for such a point."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Return at once."""


class Config:
    """Of a kernel; its buffers take no memory here."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes."""
        return 0


class Handle(NamedTuple):
    """How a dispatch went, for those that repeat or undo it.

    Args:
        tokens_N: int64 [tokens sent] which token each is, by destination and then in order.
        sent: tokens to each rank.
        received: tokens from each rank.
        num_tokens: of this rank.
    """

    tokens_N: Tensor
    sent: list[int]
    received: list[int]
    num_tokens: int


class Buffer:
    """One rank's side of dispatch and combine in a group of expert ranks."""

    num_sms = 20

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(number: int) -> None:
        """Say how many multiprocessors the kernels may use."""
        Buffer.num_sms = number

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Raises AssertionError for a number of ranks without one."""
        assert num_ranks in DEEP_EP_RANKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **_when: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        """From the experts of each token, int64 [tokens, top-k] with -1 for none: tokens for each rank; None; tokens
        for each expert; bool [tokens, ranks] whether a token goes to a rank; an event."""
        of_rank = topk_idx.div(num_experts // self.group.size(), rounding_mode="floor")
        is_token_in_rank = torch.stack([(of_rank == rank).any(1) for rank in range(self.group.size())], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return is_token_in_rank.sum(0), None, per_expert, is_token_in_rank, EventOverlap(EventHandle())

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        *,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **_when: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Send each token, once, to every rank that has one of its experts; with a handle, as that time.

        Returns what came: [tokens received, hidden]; the local experts of each, -1 for those of other ranks; their
        weights, 0 likewise; tokens for each local expert; the handle; an event. With a handle the first and the last.
        """
        event = EventOverlap(EventHandle())
        if handle is not None:
            return self._move(x[handle.tokens_N], handle.sent, handle.received), None, None, None, None, event
        destinations_N, tokens_N = is_token_in_rank.T.nonzero(as_tuple=True)
        sent = is_token_in_rank.sum(0).tolist()
        received = self._exchange(sent)
        handle = Handle(tokens_N, sent, received, x.shape[0])
        per_rank = num_tokens_per_expert.numel() // self.group.size()
        local_NK = topk_idx[tokens_N] - destinations_N[:, None] * per_rank
        is_local_NK = (local_NK >= 0) & (local_NK < per_rank)
        experts_MK = self._move(local_NK.where(is_local_NK, -1), sent, received)
        weights_MK = self._move(topk_weights[tokens_N].where(is_local_NK, 0.0), sent, received)
        counts = torch.bincount(experts_MK[experts_MK >= 0], minlength=per_rank).tolist()
        return self._move(x[tokens_N], sent, received), experts_MK, weights_MK, counts, handle, event

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **_when: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Send what was received back, and add up what comes of each token, not weighted. Weights likewise."""
        given = [x] if topk_weights is None else [x, topk_weights]
        found = [
            one.new_zeros(handle.num_tokens, one.shape[1]).index_add_(
                0, handle.tokens_N, self._move(one, handle.received, handle.sent)
            )
            for one in given
        ]
        return found[0], (found[1] if topk_weights is not None else None), EventOverlap(EventHandle())

    def _exchange(self, numbers: list[int]) -> list[int]:
        found = torch.empty(len(numbers), dtype=torch.int64)
        dist.all_to_all_single(found, torch.tensor(numbers), group=self.group)
        return found.tolist()

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows to each rank, rows from each rank."""
        found = rows.new_empty(sum(received), rows.shape[1])
        as_bytes = [tensor.contiguous().view(torch.uint8) for tensor in (found, rows)]
        dist.all_to_all_single(*as_bytes, received, sent, group=self.group)
        return found


def install() -> None:
    """Let `import deep_ep` find this."""
    module, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    module.Buffer, module.utils = Buffer, utils
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap
    sys.modules |= {"deep_ep": module, "deep_ep.utils": utils}
