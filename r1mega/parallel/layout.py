"""How ranks are cut into tensor, pipeline, expert and data parallel coordinates. No torch, no process group.

The rank order is Megatron-Core's default `tp-cp-ep-dp-pp`: tensor neighbours are consecutive ranks, pipeline stages are
farthest apart. Dense parameters see the axes (tp, dp, pp); expert parameters cut the same ranks of one pipeline stage
as (etp, ep, expert dp), so `tp * dp == etp * ep * expert_dp`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeNumbers:
    """What a layout must divide. `num_experts` and `num_kv_heads` are 0 where the model has none of its own."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class Coordinate:
    """Where one rank stands on every axis."""

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Raises nothing by itself: ask `problems()`."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all; ep and etp re-cut the tp x dp ranks of a stage, they add none."""
        return self.tp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        """How many copies of each expert shard there are."""
        return self.tp * self.dp // (self.etp * self.ep)

    def __str__(self) -> str:
        axes = [("tp", self.tp), ("pp", self.pp), ("ep", self.ep), ("etp", self.etp), ("dp", self.dp)]
        return ",".join(f"{name}={size}" for name, size in axes if size > 1) or "1"

    @staticmethod
    def parse(text: str) -> Layout:
        """`tp=2,pp=2,ep=2` -> Layout; `1` is one process. Raises ValueError on an unknown axis or a size below 1."""
        sizes: dict[str, int] = {}
        for part in text.split(",") if text not in ("", "1") else []:
            name, _, value = part.strip().partition("=")
            if name not in ("tp", "pp", "ep", "etp", "dp") or not value.isdigit() or int(value) < 1:
                raise ValueError(f"layout: got {part!r}; must be AXIS=N with AXIS one of tp pp ep etp dp and N >= 1")
            sizes[name] = int(value)
        return Layout(**sizes)

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of a global rank, in Megatron's order."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank: got {rank}; must be in [0, {self.world_size}) for layout {self}")
        per_stage = self.tp * self.dp
        pp, within = divmod(rank, per_stage)
        dp, tp = divmod(within, self.tp)
        rest, etp = divmod(within, self.etp)
        expert_dp, ep = divmod(rest, self.ep)
        return Coordinate(tp=tp, dp=dp, pp=pp, etp=etp, ep=ep, expert_dp=expert_dp)

    def problems(self, shape: ShapeNumbers | None = None) -> list[str]:
        """Every reason this layout cannot be, each as `field: got VALUE; CONSTRAINT; REMEDY`; empty when it can."""
        found = []
        for axis in ("tp", "pp", "ep", "etp", "dp"):
            if getattr(self, axis) < 1:
                found.append(f"parallel.{axis}: got {getattr(self, axis)}; must be at least 1; set parallel.{axis}=1")
        if found:
            return found
        if (self.tp * self.dp) % (self.etp * self.ep):
            found.append(
                f"parallel.ep: got ep={self.ep}, etp={self.etp}; ep x etp must divide tp x dp = {self.tp * self.dp}, "
                "because experts re-cut the ranks of one pipeline stage; lower ep or etp, or raise dp"
            )
        if shape is not None:
            found += self._shape_problems(shape)
        return found

    def _shape_problems(self, shape: ShapeNumbers) -> list[str]:
        rules: list[tuple[str, int, str, int]] = [
            ("pp", self.pp, "num_hidden_layers", shape.num_layers),
            ("tp", self.tp, "num_attention_heads", shape.num_heads),
            ("tp", self.tp, "num_key_value_heads", shape.num_kv_heads),
            ("tp", self.tp, "intermediate_size", shape.ffn_hidden_size),
        ]
        if shape.num_experts:
            rules += [
                ("ep", self.ep, "n_routed_experts", shape.num_experts),
                ("etp", self.etp, "moe_intermediate_size", shape.moe_ffn_hidden_size),
                ("tp", self.tp, "the shared experts' moe_intermediate_size", shape.shared_ffn_hidden_size),
            ]
        found = [
            f"parallel.{axis}: got {size}; must divide the model's {name} = {number}; "
            f"choose {axis} from {[d for d in range(1, min(number, 256) + 1) if number % d == 0]}"
            for axis, size, name, number in rules
            if number % size
        ]
        if not shape.num_experts and (self.ep > 1 or self.etp > 1):
            found.append(
                f"parallel.ep: got ep={self.ep}, etp={self.etp}; this model has no experts; "
                "set parallel.ep=1 parallel.etp=1"
            )
        return found
