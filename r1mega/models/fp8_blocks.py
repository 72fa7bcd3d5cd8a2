"""Weights in FP8 as DeepSeek publishes them: E4M3 values and one fp32 scale for each block of 128 x 128.

value = fp8 x scale_inv of its block (V3 section 3.3.2; the checkpoint calls the scale `weight_scale_inv`). A block that
the matrix ends in is scaled as if it were padded with zeros.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 128
E4M3_MAX = 448.0
_LARGEST_SCALE = 2.0**119  # 448 times it is still a bf16 number
SCALE_SUFFIX = "_scale_inv"
# E4M3 bits shifted into place in fp32 make a number too small by the difference of the exponents' biases, 127 - 7.
_REBIAS = 2.0**120
_SIGN_EXPONENT_MANTISSA = 0x87F00000 - (1 << 32)
# Eight values at a time, and as many as a cache holds.
_LOW_SEVEN, _ONES, _SIGNS = (np.uint64(byte * 0x0101010101010101) for byte in (0x7F, 0x01, 0x80))
_SCAN = 1 << 14


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a matrix [out, in]: [ceil(out / 128), ceil(in / 128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """bf16 [out, in] of a weight [out, in] in float8_e4m3fn and its scales [blocks, blocks] in fp32.

    The product is taken in fp32 and rounded once, into `out` where it is given. Raises ValueError where the weight
    holds NaN, or a scale is not a positive finite number or makes a weight infinite.
    """
    if not bool(((scale > 0) & (scale <= _LARGEST_SCALE)).all()):
        raise ValueError("a scale is NaN, infinite or not positive, or above 2^119, beyond which bf16 ends")
    if _has_nan(weight):
        raise ValueError("an FP8 value is NaN")
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16) if out is None else out
    wide = torch.empty(min(BLOCK, rows), columns, dtype=torch.int32)
    for block, first in enumerate(range(0, rows, BLOCK)):
        values = _decoded(weight[first : first + BLOCK], wide)
        out[first : first + BLOCK].copy_(_scaled_back(values, scale[block]))
    return out


def quantize(weight: torch.Tensor, known_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [out, in], scales fp32 [blocks, blocks]) of a weight [out, in] in bf16 or fp32, on its device.

    The scale of a block is its largest absolute value / 448, and 1 where that is zero. Rounding to bf16 loses the last
    bits of a scale; `known_scale`, the scales that the weight once came from, brings them back: a block that they
    represent exactly keeps its own. Raises ValueError where the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(scale_shape((rows, columns)), device=weight.device)
    wide = torch.empty(min(BLOCK, rows), columns, device=weight.device)
    for block, first in enumerate(range(0, rows, BLOCK)):
        part = weight[first : first + BLOCK]
        values = wide[: part.shape[0]].copy_(part)
        largest = _of_blocks(torch.maximum(values.amax(0), -values.amin(0)))
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("a weight is NaN or infinite")
        own = largest / E4M3_MAX
        scales[block] = torch.where(own > 0, own, 1.0)  # 0 also where all are too small for a scale in fp32
        if known_scale is not None:
            fits = _represents(known_scale[block], part, values)
            scales[block] = torch.where(fits, known_scale[block], scales[block])
        out[first : first + BLOCK] = _divided(values, scales[block]).to(torch.float8_e4m3fn)
    return out, scales


def _represents(scale: torch.Tensor, part: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which blocks of a strip are exactly what their FP8 values at this scale give back. Bool [blocks]."""
    usable = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, 1.0)
    again = _divided(values.clone(), scale).to(torch.float8_e4m3fn)
    again = _scaled_back(_decoded(again, torch.empty(again.shape, dtype=torch.int32)), scale)
    differs = (again.to(part.dtype) != part).any(0).float()
    return usable & (_of_blocks(differs) == 0)


def _has_nan(fp8: torch.Tensor) -> bool:
    """Whether any E4M3 value is NaN: all bits set but the sign's, which adding one to them carries over."""
    codes = fp8.contiguous().view(torch.uint8).numpy().reshape(-1)
    whole = codes.size // 8 * 8
    eights = codes[:whole].view(np.uint64)
    for first in range(0, eights.size, _SCAN):
        sums = eights[first : first + _SCAN] & _LOW_SEVEN
        sums += _ONES
        if (sums & _SIGNS).any():
            return True
    return bool(((codes[whole:] & 0x7F) == 0x7F).any())


def _decoded(fp8: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """fp32 of E4M3 values, each divided by _REBIAS, in the memory of `wide`; NaN becomes 480 / _REBIAS.

    Several times as fast as torch's own conversion on a CPU.
    """
    wide = wide[: fp8.shape[0]]
    return (
        wide.copy_(fp8.view(torch.int8))
        .bitwise_left_shift_(20)
        .bitwise_and_(_SIGN_EXPONENT_MANTISSA)
        .view(torch.float32)
    )


def _scaled_back(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decoded values times the scale [blocks] of their block, in place."""
    by_column = scale.repeat_interleave(BLOCK)[: values.shape[1]]
    rebiased = by_column * _REBIAS
    if bool(torch.isfinite(rebiased).all()):
        return values.mul_(rebiased)
    return values.mul_(_REBIAS).mul_(by_column)  # a scale so large that it overflows


def _divided(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / the scale of their block, kept in E4M3's range, in place."""
    return values.div_(scale.repeat_interleave(BLOCK)[: values.shape[1]]).clamp_(-E4M3_MAX, E4M3_MAX)


def _of_blocks(column: torch.Tensor) -> torch.Tensor:
    """The largest of each 128 numbers of a non-negative vector; the last may be of fewer."""
    padded = torch.nn.functional.pad(column, (0, -column.shape[0] % BLOCK))
    return padded.view(-1, BLOCK).amax(1)
