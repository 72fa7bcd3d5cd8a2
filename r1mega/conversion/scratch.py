"""Memory that a worker uses again for each tensor: fresh pages cost as much as copying into them."""

from __future__ import annotations

import torch


class Scratch:
    """One buffer for each role, as large as the largest tensor that has had it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, role: str, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of undefined content. What the role held before is gone."""
        held = self._buffers.get(role)
        if held is None or held.numel() < nbytes:
            self._buffers.pop(role, None)
            held = self._buffers[role] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes]
