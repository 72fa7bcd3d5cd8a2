"""A tensor of the trainer as an engine is given it: in its dtype, or in FP8 blocks with their scales.

FP8 blocks are made of whole tensors, where they come together: a cut of the trainer's layout may run through a block,
whose scale no rank could know alone. What moves between ranks is therefore in the trainer's own dtype.
"""

from __future__ import annotations

import torch

from r1mega.models import fp8_blocks
from r1mega.models.fp8_blocks import BLOCK, SCALE_SUFFIX
from r1mega.models.param_map import HfTensor, Slot
from r1mega.weights.slices import dtype_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wire_dtype(slot: Slot, serves: str, held: str) -> str:
    """What a shard of the slot moves between ranks in, where the trainer holds `held` and engines serve `serves`."""
    if slot.fp32:
        return "fp32"
    return held if serves == "fp8" else serves


def served(slot: Slot, tensor: HfTensor, value: torch.Tensor, serves: str) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that an engine is given of one whole tensor of a slot; its own memory where it can be.

    Raises ValueError naming a tensor that FP8 cannot hold.
    """
    kind = dtype_of(slot, tensor, serves)
    if kind != "fp8":
        return [(tensor.name, value.to(DTYPES[kind]))]
    try:
        quantised, scales = fp8_blocks.quantize(value)
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}; FP8 cannot hold it; the training has diverged, go back") from None
    return [(tensor.name, quantised), (tensor.name + SCALE_SUFFIX, scales)]


def as_reported(given: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """The tensor whose bytes SGLang's checksum is of, for what `served` returned.

    Of FP8 blocks it hashes the product with the scale in bf16 (SGLang 0.5.21, `layers/quantization/fp8_utils.py`
    `block_quant_dequant`): taken in fp32, rounded once.
    """
    (_, value), *rest = given
    if not rest:
        return value
    rows, columns = value.shape
    scale = rest[0][1].repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (value.to(torch.float32) * scale).to(torch.bfloat16)
