"""Scatter a checkpoint into a rank's parameters, and gather parameters back into Hugging Face tensors.

`fill` reads only what the rank holds. `gather` walks the table in its one global order, in buckets of a byte limit:
every owner broadcasts its shards of a bucket in one message, and whoever wants the tensors puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Cut, HfTensor, Placement, Slot, Vocabulary
from r1mega.models.tables import placement_of, slots_of
from r1mega.parallel.groups import Groups


class TensorSource(Protocol):
    """Where Hugging Face tensors come from."""

    def get(self, tensor: HfTensor) -> torch.Tensor:
        """The tensor, of the shape asked for. Raises ValueError where it is absent or misshapen."""

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name of its own."""


class ShardedModel:
    """The parameters of one rank, seen through the table of its family.

    Args:
        chunks: this rank's bare GPTModels (not wrapped by DDP), one unless the pipeline is interleaved.
        fields: the model's config.json.
        layer_spec: "torch" or "te", which names the modules.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], fields: HfFields, groups: Groups, layer_spec: str) -> None:
        self.slots = slots_of(fields)
        self.placement: Placement = placement_of(fields, groups.layout)
        self._groups = groups
        self._dtype = next(chunks[0].parameters()).dtype
        named = {(index, name): value for index, chunk in enumerate(chunks) for name, value in _named(chunk)}
        self.local: list[tuple[Slot, int, torch.Tensor]] = []
        seen = set()
        for slot in self.slots:
            shard = self.placement.shard_on(slot, groups.rank)
            if shard is None:
                continue
            key = self.placement.model_index(slot), self.placement.local_name(slot, layer_spec)
            if slot.is_copy and (key not in named or key in seen):
                continue  # the chunk holds the table itself
            if key not in named:
                raise ValueError(
                    f"table of {fields.family}: {slot.name} is {key[1]} here, which the model does not have"
                )
            seen.add(key)
            _mark(named[key], slot)
            self.local.append((slot, shard, named[key]))
        missing = sorted(set(named) - seen)
        if missing:
            raise ValueError(
                f"table of {fields.family}: the model's {missing[0][1]} and {len(missing) - 1} more are in no slot"
            )

    @torch.no_grad()
    def fill(self, source: TensorSource) -> None:
        """Fill every parameter of this rank from the source. Raises ValueError where a shard does not fit."""
        for slot, shard, parameter in self.local:
            tensors = [source.get(tensor) for tensor in slot.tensors]
            for alias in slot.aliases:
                if source.holds(alias.name) and not torch.equal(source.get(alias), tensors[0]):
                    raise ValueError(
                        f"{alias.name}: differs from {slot.tensors[0].name}; the multi-token-prediction layer shares "
                        "that table with the model; make them equal in a copy of the checkpoint, or set model.mtp=drop"
                    )
            value = slot.op.to_megatron(tensors, shard, self.placement.num_shards(slot))
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{slot.name}: got shape {tuple(value.shape)}; this rank holds {tuple(parameter.shape)}"
                )
            parameter.copy_(value)

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the tables of the vocabulary, whose last rows no checkpoint has where the ranks do not divide it."""
        for slot, _, parameter in self.local:
            if isinstance(slot.op, Vocabulary):
                parameter.zero_()

    def gather(self, *, wanted: bool = True, bucket_bytes: int = 1 << 28) -> Iterator[tuple[str, torch.Tensor]]:
        """(hf_name, tensor) of the whole model, on the device, in the table's order. Collective over the world.

        Every rank must iterate to the end; one that does not want the tensors (`wanted=False`) yields none.
        """
        values = {(id(slot), shard): parameter for slot, shard, parameter in self.local}
        for bucket in self._buckets(bucket_bytes):
            shards = self._exchange(bucket, values, self._dtype_of)
            if not wanted:
                continue
            for slot in bucket:
                parts = [shards[id(slot), shard] for shard in range(self.placement.num_shards(slot))]
                for tensor, value in zip(slot.tensors, slot.op.to_hf(parts), strict=True):
                    yield tensor.name, value
                    for alias in slot.aliases:
                        yield alias.name, value

    def gather_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Like `gather`, of the gradients. `parameter.full_grad` must have been set to the whole reduced gradient."""
        values = {
            (id(slot), shard): getattr(p, "full_grad", torch.zeros_like(p, dtype=torch.float32))
            for slot, shard, p in self.local
        }
        for bucket in self._buckets(1 << 28):
            # Summed in fp32 whatever the parameters are held in.
            shards = self._exchange(bucket, values, lambda _slot: torch.float32)
            for slot in bucket:
                if slot.fp32:
                    continue  # gate biases have no gradient
                parts = [shards[id(slot), shard] for shard in range(self.placement.num_shards(slot))]
                for tensor, value in zip(slot.tensors, slot.op.to_hf(parts), strict=True):
                    yield tensor.name, value

    def shard_shape(self, slot: Slot) -> torch.Size:
        """The shape of each shard of a slot, without its data."""
        metas = [torch.empty(tensor.shape, device="meta") for tensor in slot.tensors]
        return slot.op.to_megatron(metas, 0, self.placement.num_shards(slot)).shape

    def _dtype_of(self, slot: Slot) -> torch.dtype:
        return torch.float32 if slot.fp32 else self._dtype

    def _buckets(self, limit: int) -> Iterator[list[Slot]]:
        bucket, size = [], 0
        for slot in self.slots:
            if slot.is_copy:
                continue
            numel = sum(torch.Size(tensor.shape).numel() for tensor in slot.tensors)
            nbytes = numel * self._dtype_of(slot).itemsize
            if bucket and size + nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(slot)
            size += nbytes
        yield bucket

    @torch.no_grad()
    def _exchange(
        self,
        bucket: list[Slot],
        values: dict[tuple[int, int], torch.Tensor],
        dtype_of: Callable[[Slot], torch.dtype],
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Every shard of the bucket's slots, on every rank, each owner's in one broadcast of bytes."""
        by_owner: dict[int, list[tuple[Slot, int]]] = {}
        for slot in bucket:
            for shard in range(self.placement.num_shards(slot)):
                by_owner.setdefault(self.placement.owner(slot, shard), []).append((slot, shard))
        shapes = {id(slot): self.shard_shape(slot) for slot in bucket}
        result = {}
        for owner in sorted(by_owner):
            pieces = by_owner[owner]
            sizes = [shapes[id(slot)].numel() * dtype_of(slot).itemsize for slot, _ in pieces]
            if owner == self._groups.rank:
                parts = [
                    values[id(slot), shard].detach().contiguous().view(-1).view(torch.uint8) for slot, shard in pieces
                ]
                flat = torch.cat(parts)
            else:
                flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self._groups.device)
            if self._groups.layout.world_size > 1:
                dist.broadcast(flat, src=owner)
            for (slot, shard), part in zip(pieces, flat.split(sizes), strict=True):
                dtype = dtype_of(slot)
                # A split of the byte buffer may not be aligned to its dtype.
                aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
                result[id(slot), shard] = aligned.view(dtype).view(shapes[id(slot)])
        return result


def _mark(parameter: torch.Tensor, slot: Slot) -> None:
    """Tell Megatron whether the ranks of the axis hold different parts or copies.

    The gradient's norm, which clipping goes by, takes parts from all of them and copies from the first. Megatron marks
    parts only where it initialises the weights itself, and Transformer Engine marks every linear layer's weights as
    parts, MLA's down-projections too, which are then counted once for each tensor rank.
    """
    is_cut = slot.axis is not None
    parameter.tensor_model_parallel = is_cut
    parameter.partition_dim = (slot.op.dim if isinstance(slot.op, Cut) else 0) if is_cut else -1
    parameter.partition_stride = 1


def _named(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that belong to the checkpoint."""
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(".expert_bias"))
