"""How ranks are cut into tensor, context, pipeline, expert and data parallel coordinates. No torch, no process group.

The rank order is Megatron-Core's default `tp-cp-ep-dp-pp`: tensor neighbours are consecutive ranks, pipeline stages are
farthest apart. Dense parameters see the axes (tp, cp, dp, pp); expert parameters cut the same ranks of one pipeline
stage as (etp, ep, expert dp), so `tp * cp * dp == etp * ep * expert_dp`.

A pipeline stage holds `vpp` *chunks* of layers: the layers are dealt to pp * vpp chunks in order, chunk i to stage
i % pp. With vpp = 1 a stage is one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


_AXES = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Raises nothing by itself: ask `problems()`.

    `stages` are the decoder layers of each of the pp * vpp chunks, in order; empty deals them out evenly.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    cp: int = 1
    vpp: int = 1
    stages: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks in all; ep and etp re-cut the tp x cp x dp ranks of a stage, they add none."""
        return self.per_stage * self.pp

    @property
    def per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """How many copies of each expert shard there are."""
        return self.per_stage // (self.etp * self.ep)

    @property
    def num_chunks(self) -> int:
        """Chunks of layers in the whole pipeline."""
        return self.pp * self.vpp

    def __str__(self) -> str:
        axes = [f"{name}={getattr(self, name)}" for name in _AXES if getattr(self, name) > 1]
        if self.stages:
            axes.append("stages=" + "+".join(map(str, self.stages)))
        return ",".join(axes) or "1"

    @staticmethod
    def of(*, stages: Sequence[int] | None = None, **sizes: int) -> Layout:
        """The layout of a configuration's `parallel` section, given by name."""
        return Layout(**sizes, stages=tuple(stages or ()))

    @staticmethod
    def parse(text: str) -> Layout:
        """`tp=2,pp=2,ep=2` -> Layout; `1` is one process; `pp=2,stages=3+1` says the layers of each chunk.

        Raises ValueError on an unknown axis or a size below 1.
        """
        sizes: dict[str, int] = {}
        stages: tuple[int, ...] = ()
        for part in text.split(",") if text not in ("", "1") else []:
            name, _, value = part.strip().partition("=")
            if name == "stages" and all(count.isdigit() for count in value.split("+")):
                stages = tuple(int(count) for count in value.split("+"))
                continue
            if name not in _AXES or not value.isdigit() or int(value) < 1:
                raise ValueError(
                    f"layout: got {part!r}; must be AXIS=N with AXIS one of {' '.join(_AXES)} and N >= 1, "
                    "or stages=N+N+... with the layers of each chunk"
                )
            sizes[name] = int(value)
        return Layout(**sizes, stages=stages)

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of a global rank, in Megatron's order."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank: got {rank}; must be in [0, {self.world_size}) for layout {self}")
        pp, within = divmod(rank, self.per_stage)
        outer, tp = divmod(within, self.tp)
        dp, cp = divmod(outer, self.cp)
        rest, etp = divmod(within, self.etp)
        expert_dp, ep = divmod(rest, self.ep)
        return Coordinate(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, expert_dp=expert_dp)

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each chunk, in the order of the layers."""
        return self.stages or (num_layers // self.num_chunks,) * self.num_chunks

    def layer_place(self, layer: int, num_layers: int) -> tuple[int, int]:
        """(chunk in the whole pipeline, layer inside it) of a decoder layer."""
        first = 0
        for chunk, count in enumerate(self.chunk_layers(num_layers)):
            if layer < first + count:
                return chunk, layer - first
            first += count
        raise ValueError(f"layer: got {layer}; must be below {num_layers}")

    def problems(self, shape: ShapeNumbers | None = None) -> list[str]:
        """Every reason this layout cannot be, each as `field: got VALUE; CONSTRAINT; REMEDY`; empty when it can."""
        found = []
        for axis in _AXES:
            if getattr(self, axis) < 1:
                found.append(f"parallel.{axis}: got {getattr(self, axis)}; must be at least 1; set parallel.{axis}=1")
        if found:
            return found
        if self.per_stage % (self.etp * self.ep):
            found.append(
                f"parallel.ep: got ep={self.ep}, etp={self.etp}; ep x etp must divide tp x cp x dp = {self.per_stage}, "
                "because experts re-cut the ranks of one pipeline stage; lower ep or etp, or raise dp"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append(
                f"parallel.vpp: got {self.vpp} with pp=1; interleaving needs pipeline stages; set parallel.vpp=1"
            )
        if self.stages and len(self.stages) != self.num_chunks:
            found.append(
                f"parallel.stages: got {len(self.stages)} numbers; must be pp x vpp = {self.num_chunks} of them, "
                "the layers of each chunk; give one for each"
            )
        if shape is not None:
            found += self._shape_problems(shape)
        return found

    def _shape_problems(self, shape: ShapeNumbers) -> list[str]:
        rules: list[tuple[str, int, str, int]] = [
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
            f"choose {axis} from {_divisors(number)}"
            for axis, size, name, number in rules
            if number % size
        ]
        found += self._stage_problems(shape.num_layers)
        if not shape.num_experts and (self.ep > 1 or self.etp > 1):
            found.append(
                f"parallel.ep: got ep={self.ep}, etp={self.etp}; this model has no experts; "
                "set parallel.ep=1 parallel.etp=1"
            )
        return found

    def _stage_problems(self, num_layers: int) -> list[str]:
        if not self.stages:
            if num_layers % self.num_chunks == 0:
                return []
            axis = "vpp" if num_layers % self.pp == 0 else "pp"
            return [
                f"parallel.{axis}: got pp={self.pp}, vpp={self.vpp}; pp x vpp must divide num_hidden_layers "
                f"= {num_layers}, or parallel.stages say the layers of each chunk; choose pp x vpp from "
                f"{_divisors(num_layers)} or set parallel.stages=[{','.join(map(str, self._example(num_layers)))}]"
            ]
        if len(self.stages) != self.num_chunks:
            return []  # reported already
        got, remedy = f"parallel.stages: got {list(self.stages)}", "change the counts"
        if sum(self.stages) != num_layers:
            return [f"{got}; must add up to the model's num_hidden_layers = {num_layers}; {remedy}"]
        if min(self.stages[1:-1], default=1) < 1:
            return [f"{got}; only the first chunk (embedding) and the last (output) may hold no layer; {remedy}"]
        return []

    def _example(self, num_layers: int) -> list[int]:
        """A split as even as can be, the last chunks, which also hold the output, with fewer."""
        base, extra = divmod(num_layers, self.num_chunks)
        return [base + (chunk < extra) for chunk in range(self.num_chunks)]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, min(number, 256) + 1) if number % size == 0]
