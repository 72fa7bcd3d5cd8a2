"""How an engine cuts a model, as far as its loader minds: which rank needs which experts. No torch.

SGLang cuts everything but the routed experts itself, from whole tensors, whatever its tensor parallel size is and
whether attention is data parallel. Its expert parallel ranks re-cut the tensor parallel ones: `moe_tp = tp / ep`
neighbours share an expert rank, and expert rank e owns the routed experts [e * E / ep, (e + 1) * E / ep) (SGLang
`distributed/parallel_state.py`, groups `_MOE_EP`, and `layers/moe/fused_moe_triton/layer.py`). Other expert placements
(redundant experts, `--moe-dp-size` over 1) are not planned for: such an engine can be declared with ep=1, and is then
sent everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_AXES = ("tp", "ep", "attn_dp", "dp")


@dataclass(frozen=True)
class EngineLayout:
    """Sizes of one engine. Raises nothing by itself: ask `problems()`.

    Args:
        tp: ranks of one model; one payload of weights is handed to each.
        ep: expert parallel size, within tp.
        attn_dp: data parallel attention, within tp; it changes nothing of what a rank is sent.
        dp: whole copies of the tp ranks in one engine; rank r of copy d is rank d * tp + r. (SGLang refuses weights by
            tensor with `--dp-size` over 1 unless attention is data parallel: start several engines there instead.)
    """

    tp: int = 1
    ep: int = 1
    attn_dp: int = 1
    dp: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks that receive weights."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name)}" for name in _AXES if getattr(self, name) > 1) or "1"

    @staticmethod
    def parse(text: str) -> EngineLayout:
        """`tp=8,ep=8` -> EngineLayout; `1` is one rank. Raises ValueError on an unknown axis or a size below 1."""
        sizes: dict[str, int] = {}
        for part in text.split(",") if text not in ("", "1") else []:
            name, _, value = part.strip().partition("=")
            if name not in _AXES or not value.isdigit() or int(value) < 1:
                raise ValueError(f"engine: got {part!r}; must be AXIS=N with AXIS one of {' '.join(_AXES)} and N >= 1")
            sizes[name] = int(value)
        return EngineLayout(**sizes)

    def expert_block(self, rank: int) -> int:
        """Which of the `ep` blocks of experts a rank owns."""
        return rank % self.tp // (self.tp // self.ep)

    def problems(self, num_experts: int) -> list[str]:
        """Every reason an engine cannot be so, as `field: got VALUE; CONSTRAINT; REMEDY`."""
        found = [
            f"engine.{axis}: got {getattr(self, axis)}; must be at least 1; set it to 1"
            for axis in _AXES
            if getattr(self, axis) < 1
        ]
        if found:
            return found
        for axis, size in (("ep", self.ep), ("attn_dp", self.attn_dp)):
            if self.tp % size:
                found.append(f"engine.{axis}: got {size}; must divide the engine's tp = {self.tp}; change one of them")
        if self.ep > 1 and not num_experts:
            found.append(f"engine.ep: got {self.ep}; this model has no experts; set ep=1")
        elif self.ep > 1 and num_experts % self.ep:
            found.append(f"engine.ep: got {self.ep}; must divide the model's n_routed_experts = {num_experts}")
        return found


@dataclass(frozen=True)
class Receivers:
    """All ranks of all engines, numbered one after the other."""

    engines: tuple[EngineLayout, ...]
    num_experts: int

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(engine, rank) of every receiver."""
        return [(index, rank) for index, engine in enumerate(self.engines) for rank in range(engine.num_ranks)]

    @cached_property
    def _cuts(self) -> list[int]:
        return sorted({engine.ep for engine in self.engines})

    @cached_property
    def _owned(self) -> np.ndarray:
        """[receivers, 2]: of each, which of the cuts and which of its blocks of experts."""
        own = [
            (self._cuts.index(self.engines[index].ep), self.engines[index].expert_block(rank))
            for index, rank in self.places
        ]
        return np.array(own, dtype=np.int64).reshape(-1, 2)

    def index(self, engine: int, rank: int) -> int:
        """The number of a receiver. Raises ValueError where there is none."""
        if not (0 <= engine < len(self.engines) and 0 <= rank < self.engines[engine].num_ranks):
            raise ValueError(f"engine rank: got {engine}, {rank}; must be one of {list(map(str, self.engines))}")
        return sum(other.num_ranks for other in self.engines[:engine]) + rank

    def blocks(self, expert: int | None) -> tuple[int, ...]:
        """The blocks that own a routed expert, one for each expert parallel size there is; none for all other tensors.

        Tensors of the same blocks are needed by the same receivers.
        """
        return () if expert is None else tuple(expert * ep // self.num_experts for ep in self._cuts)

    def of(self, blocks: Sequence[int]) -> np.ndarray:
        """The receivers that need the tensors of these `blocks`, in order."""
        if not blocks:
            return np.arange(len(self.places))
        needed = np.zeros(len(self.places), dtype=bool)
        for cut, block in enumerate(blocks):
            needed |= (self._owned[:, 0] == cut) & (self._owned[:, 1] == block)
        return np.flatnonzero(needed)

    def needs(self, receiver: int, blocks: Sequence[int]) -> bool:
        """Whether a receiver is one of them."""
        cut, own = self._owned[receiver].tolist()
        return not blocks or blocks[cut] == own
