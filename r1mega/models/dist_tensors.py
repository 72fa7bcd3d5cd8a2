"""The tensors of a Megatron distributed checkpoint (torch_dist), as the family's table declares them.

Such a checkpoint names tensors of the whole model, whatever the layout was that wrote it: the names are those of the
Transformer Engine modules (`layer_spec` makes the torch modules store theirs under the same), layers are counted over
the whole model, and the experts of a layer stand in one tensor [experts, out, in].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor, Placement, Slot, te_renamed
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.layout import Layout


@dataclass(frozen=True)
class Piece:
    """A box of one tensor of the checkpoint, and the Hugging Face tensors that it alone is made of.

    Args:
        key: the tensor's name.
        global_shape: the whole tensor's shape.
        offset: where the box begins in it.
        shape: of the box; the number of experts counts as a dimension of one.
        tensors: the Hugging Face tensors, in the order the slot's operation takes them.
        aliases: tensors of the Hugging Face checkpoint that repeat `tensors[0]`.
        is_whole: whether the operation is needed; otherwise the box is the one tensor as it is.
    """

    slot: Slot
    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    tensors: tuple[HfTensor, ...]
    aliases: tuple[HfTensor, ...]
    is_whole: bool

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The box, of `shape`."""
        made = self.slot.op.to_megatron(tensors, 0, 1) if self.is_whole else tensors[0]
        return made.reshape(self.shape)

    def to_hf(self, box: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors of a box of `shape`."""
        if self.slot.expert is not None:
            box = box.squeeze(0)
        return self.slot.op.to_hf([box]) if self.is_whole else [box]


def pieces_of(fields: HfFields) -> Iterator[Piece]:
    """Every box of the model, in the table's order. No two overlap, and together they fill every tensor."""
    placement = placement_of(fields, Layout())
    for slot in slots_of(fields):
        if not slot.is_copy:
            yield from _pieces(slot, placement)


def box_name(piece: Piece) -> str:
    """The name of a box in records: its tensor's, and where it begins if it is not the whole."""
    if piece.shape == piece.global_shape:
        return piece.key
    return f"{piece.key}[{','.join(map(str, piece.offset))}]"


def _pieces(slot: Slot, placement: Placement) -> Iterator[Piece]:
    key = _key(slot, placement)
    groups = [(tensor,) for tensor in slot.tensors] if slot.op.stored_apart else [slot.tensors]
    boxes = [_shape(slot, group) for group in groups]
    rows = sum(box[0] for box in boxes)
    expert = () if slot.expert is None else (slot.expert,)
    first = 0
    for group, box in zip(groups, boxes, strict=True):
        yield Piece(
            slot=slot,
            key=key,
            global_shape=(placement.num_experts,) * len(expert) + (rows, *box[1:]),
            offset=(*expert, first, *(0 for _ in box[1:])),
            shape=(1,) * len(expert) + box,
            tensors=group,
            aliases=slot.aliases,
            is_whole=not slot.op.stored_apart,
        )
        first += box[0]


def _shape(slot: Slot, group: tuple[HfTensor, ...]) -> tuple[int, ...]:
    if slot.op.stored_apart:
        return group[0].shape
    metas = [torch.empty(tensor.shape, device="meta") for tensor in group]
    return tuple(slot.op.to_megatron(metas, 0, 1).shape)


def _key(slot: Slot, placement: Placement) -> str:
    if slot.expert is not None:
        return slot.name.replace(f"local_experts.{slot.expert}.", "experts.", 1)
    return te_renamed(slot.name, has_mla=placement.has_mla, is_moe_layer=placement.is_moe_layer(slot))
