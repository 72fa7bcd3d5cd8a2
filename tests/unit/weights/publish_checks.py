"""Says what is wrong with the messages of a publish plan, without the plan's own arithmetic: tensors whose values are
their positions are cut by the table's operations, sent as the messages say, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from r1mega.models import fp8_blocks, hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Placement, Slot
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.plan import Message, PublishPlan, Transfer

_COMMON = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000}


def fields_of(family: str, *, layers: int, mtp: int = 0, **sizes) -> HfFields:
    """A small model of a family."""
    raw = {
        "model_type": family, "vocab_size": 29, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, **_COMMON,
    }  # fmt: skip
    if family == "deepseek_v3":
        raw |= {
            "moe_intermediate_size": 8, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "routed_scaling_factor": 2.5, "kv_lora_rank": 6, "q_lora_rank": 10, "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
        }  # fmt: skip
    fields = hf_fields.parse(raw | sizes)
    return HfFields(fields.path, fields.family, fields.values, fields.rope, num_mtp_layers=mtp)


POWER = st.sampled_from([1, 1, 2, 4])


@st.composite
def layouts(draw, *, is_moe: bool, most_ranks: int) -> tuple[Layout, int]:
    """A trainer's layout with uneven stages, and how many layers they hold."""
    tp, cp, dp = draw(POWER), draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2, 3, 4]))
    pp = draw(st.sampled_from([1, 2, 3]))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    assume(tp * cp * dp * pp <= most_ranks)
    ep, etp = (draw(POWER), draw(st.sampled_from([1, 1, 2]))) if is_moe else (1, 1)
    assume((tp * cp * dp) % (ep * etp) == 0)
    chunks = pp * vpp
    least = [0 if chunks > 1 and at in (0, chunks - 1) else 1 for at in range(chunks)]
    stages = tuple(draw(st.integers(least[at], 2)) for at in range(chunks))
    assume(sum(stages) > 0)
    return Layout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=vpp, ep=ep, etp=etp, stages=stages), sum(stages)


@st.composite
def engine_layouts(draw, *, num_experts: int) -> EngineLayout:
    tp = draw(st.sampled_from([1, 2, 4]))
    divisors = [size for size in (1, 2, 4) if tp % size == 0]
    ep = draw(st.sampled_from([size for size in divisors if num_experts])) if num_experts else 1
    return EngineLayout(tp=tp, ep=ep, attn_dp=draw(st.sampled_from(divisors)), dp=draw(st.sampled_from([1, 1, 2])))


@st.composite
def cases(draw, *, most_ranks: int = 24, **sizes) -> tuple[HfFields, Layout, list[EngineLayout]]:
    """(model, trainer, engines) that fit each other."""
    family = draw(st.sampled_from(["deepseek_v3", "qwen2", "llama"]))
    is_moe = family == "deepseek_v3"
    layout, layers = draw(layouts(is_moe=is_moe, most_ranks=most_ranks))
    sizes = {"tie_word_embeddings": draw(st.booleans())} | sizes
    sizes.setdefault("vocab_size", draw(st.integers(16, 40)))
    if is_moe:
        sizes["first_k_dense_replace"] = draw(st.integers(0, layers))
        sizes["q_lora_rank"] = draw(st.sampled_from([None, 10]))
    else:
        sizes["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 4) if n % layout.tp == 0]))
    mtp = draw(st.sampled_from([0, 1])) if is_moe and not sizes["tie_word_embeddings"] else 0
    fields = fields_of(family, layers=layers, mtp=mtp, **sizes)
    assert layout.problems(fields.shape()) == []
    engine = engine_layouts(num_experts=fields["n_routed_experts"] if is_moe else 0)
    return fields, layout, draw(st.lists(engine, min_size=1, max_size=3))


def wanted_by(fields: HfFields, engine: EngineLayout, rank: int) -> dict[str, tuple[Slot, int]]:
    """(slot, which of its tensors) of every name that an engine rank must be sent, by SGLang's rule."""
    found = {}
    for slot in slots_of(fields):
        if slot.is_copy:
            continue
        if slot.expert is not None:
            each = fields["n_routed_experts"] // engine.ep
            first = rank % engine.tp // (engine.tp // engine.ep) * each
            if not first <= slot.expert < first + each:
                continue
        found |= {tensor.name: (slot, index) for index, tensor in enumerate(slot.tensors)}
    return found


class Coded:
    """The model's tensors, each element its own number, from 1: padding is 0 and belongs to nothing."""

    def __init__(self, fields: HfFields, layout: Layout) -> None:
        self.placement: Placement = placement_of(fields, layout)
        self._shards: dict[tuple[str, int], torch.Tensor] = {}
        self._first: dict[str, int] = {}
        first = 1
        for slot in slots_of(fields):
            for tensor in slot.tensors:
                self._first[tensor.name] = first
                first += int(np.prod(tensor.shape))

    def tensor(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        numbers = torch.arange(int(np.prod(shape)), dtype=torch.int64).view(*shape)
        return numbers + self._first[name]

    def shard(self, slot: Slot, index: int) -> torch.Tensor:
        key = slot.name, index
        if key not in self._shards:
            tensors = [self.tensor(tensor.name, tensor.shape) for tensor in slot.tensors]
            self._shards[key] = slot.op.to_megatron(tensors, index, self.placement.num_shards(slot))
        return self._shards[key]


def faults(coded: Coded, fields: HfFields, engine: EngineLayout, rank: int, messages: Iterable[Message]) -> list[str]:
    """What is wrong with the messages to one engine rank; empty when it gets exactly what it must have, once."""
    wanted = wanted_by(fields, engine, rank)
    whole = {name: coded.tensor(name, slot.tensors[at].shape) for name, (slot, at) in wanted.items()}
    arrived = {name: torch.zeros_like(value) for name, value in whole.items()}
    times = {name: torch.zeros_like(value) for name, value in whole.items()}
    found = []
    for message in messages:
        for transfer in message.transfers:
            name = transfer.tensor.name
            if name not in wanted:
                found.append(f"{name}: not needed here")
                continue
            if coded.placement.shard_on(transfer.slot, message.sender) != transfer.shard:
                found.append(f"{name}: rank {message.sender} does not hold shard {transfer.shard}")
            box = tuple(slice(at, at + size) for at, size in zip(transfer.offset, transfer.shape, strict=True))
            sent = coded.shard(transfer.slot, transfer.shard)[transfer.row : transfer.row + transfer.shape[0]]
            if sent.shape != arrived[name][box].shape:
                found.append(f"{name}: {tuple(sent.shape)} sent for {tuple(arrived[name][box].shape)}")
                continue
            arrived[name][box] = sent
            times[name][box] += 1
    for name, value in whole.items():
        if not bool((times[name] == 1).all()):
            found.append(f"{name}: {int((times[name] != 1).sum())} elements do not arrive exactly once")
        elif not torch.equal(arrived[name], value):
            found.append(f"{name}: {int((arrived[name] != value).sum())} elements are others")
    return found


def is_exact_cover(shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offset, shape) fill a shape without overlap; sizes do not matter."""
    edges = [
        sorted({0, size} | {box[0][dim] for box in boxes} | {box[0][dim] + box[1][dim] for box in boxes})
        for dim, size in enumerate(shape)
    ]
    if any(edge[0] < 0 or edge[-1] > size for edge, size in zip(edges, shape, strict=True)):
        return False
    times = np.zeros([len(edge) - 1 for edge in edges], dtype=np.int64)
    for offset, size in boxes:
        where = tuple(
            slice(edge.index(at), edge.index(at + length)) for edge, at, length in zip(edges, offset, size, strict=True)
        )
        times[where] += 1
    return bool((times == 1).all())


def cover_faults(plan: PublishPlan, fields: HfFields, engine: int, rank: int) -> list[str]:
    """As `faults`, for models of any size: rectangles only."""
    layout = plan.receivers.engines[engine]
    wanted = wanted_by(fields, layout, rank)
    boxes: dict[str, list[Transfer]] = {name: [] for name in wanted}
    found = []
    for message in plan.receives_of(engine, rank):
        for transfer in message.transfers:
            if transfer.tensor.name not in boxes:
                found.append(f"{transfer.tensor.name}: not needed here")
                continue
            if plan.placement.shard_on(transfer.slot, message.sender) != transfer.shard:
                found.append(f"{transfer.tensor.name}: rank {message.sender} does not hold it")
            boxes[transfer.tensor.name].append(transfer)
    for name, (slot, at) in wanted.items():
        shape = slot.tensors[at].shape
        if not is_exact_cover(shape, [(box.offset, box.shape) for box in boxes[name]]):
            found.append(f"{name}: not covered exactly once")
        if boxes[name] and boxes[name][0].dtype == "fp8":
            scales = [(box.scale_offset, box.scale_shape) for box in boxes[name]]
            if not is_exact_cover(fp8_blocks.scale_shape(shape), scales):
                found.append(f"{name}: its scales are not covered exactly once")
    return found
