"""Builds the stages of DeepSeek-V3 at a layout of hundreds of ranks, in one process without their memory, and compares
every parameter of every rank with the table. Prints one JSON line. `python imagined_671b.py LAYOUT`; with `--break` one
row of the table is wrong, and only the first stage is looked at."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from r1mega.models import cards, hf_fields
from r1mega.models.param_map import Cut, Placement, Slot
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

FIELDS = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True)

Shapes = dict[str, tuple[int, ...]]


def stage_of_megatron(layout: Layout, rank: int) -> Shapes:
    """Name and shape of every parameter and gate bias of the model that Megatron builds for a rank."""
    world = groups.imagine(layout, rank)
    from r1mega.models.build import build_chunks
    from r1mega.models.hf_config import ModelOptions

    # Megatron allocates and would fill; nobody reads what the numbers are.
    torch.nn.init.normal_ = lambda tensor, *_args, **_kwargs: tensor
    (model,) = build_chunks(FIELDS, world, ModelOptions(params_dtype=torch.bfloat16))
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found |= {name: tuple(b.shape) for name, b in model.named_buffers() if name.endswith(".expert_bias")}
    groups.shutdown()
    return found


def shapes_of(placement: Placement, slots: list[Slot]) -> dict[int, tuple[int, ...]]:
    """The shape of each slot's shards."""
    shapes = {}
    for slot in slots:
        metas = [torch.empty(tensor.shape, device="meta") for tensor in slot.tensors]
        shapes[id(slot)] = tuple(slot.op.to_megatron(metas, 0, placement.num_shards(slot)).shape)
    return shapes


def main() -> None:
    layout = Layout.parse(sys.argv[1])
    assert not layout.problems(FIELDS.shape()), layout.problems(FIELDS.shape())
    placement, slots = placement_of(FIELDS, layout), slots_of(FIELDS)
    if "--break" in sys.argv:  # a shape that no model of this config.json has
        at = next(i for i, slot in enumerate(slots) if slot.name.endswith("linear_proj.weight"))
        slots[at] = replace(slots[at], op=Cut(0))
    shapes = shapes_of(placement, slots)
    owners: dict[tuple[int, int], int] = {}
    wrong: list[str] = []
    for stage in range(1 if "--break" in sys.argv else layout.pp):
        first, last = stage * layout.per_stage, (stage + 1) * layout.per_stage - 1
        built = stage_of_megatron(layout, first)
        if built != stage_of_megatron(layout, last):
            wrong.append(f"stage {stage}: ranks {first} and {last} hold models of other shapes")
        here = [slot for slot in slots if placement.stage(slot) == stage]
        for rank in range(first, last + 1):
            filled: Shapes = {}
            for slot in here:
                shard = placement.shard_on(slot, rank)
                if shard is None:
                    continue
                name = placement.local_name(slot)
                # A copy fills a table that this stage needs again, unless the stage holds the table itself.
                if name in filled:
                    if not slot.is_copy:
                        wrong.append(f"rank {rank}: {name} is filled twice")
                    continue
                filled[name] = shapes[id(slot)]
                owners[id(slot), shard] = owners.get((id(slot), shard), 0) + 1
            if filled != built:
                odd = sorted(set(filled.items()) ^ set(built.items()))[:3]
                wrong.append(f"rank {rank}: table and model differ in {odd}")
    copies = {"tp": layout.cp * layout.dp, "etp": layout.expert_dp, None: layout.per_stage}
    for slot in slots:
        expected = layout.expert_dp if slot.expert is not None else copies[slot.axis]
        for shard in range(placement.num_shards(slot)):
            if not slot.is_copy and owners.get((id(slot), shard), 0) != expected:
                wrong.append(f"{slot.name}, shard {shard}: {owners.get((id(slot), shard), 0)} ranks, not {expected}")
    print(json.dumps({"ranks": layout.world_size, "shards": len(owners), "wrong": wrong[:10]}))


if __name__ == "__main__":
    main()
