"""FP8 blocks against a reference in plain loops: every E4M3 code, every edge, and back again without a bit changed."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.models.fp8_blocks import BLOCK, E4M3_MAX, dequantize, quantize, scale_shape

SIZES = [(1, 1), (3, 5), (127, 129), (128, 128), (200, 300), (256, 384), (1, 513), (385, 2)]
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


def e4m3(code: int) -> float:
    """The number a byte s eeee mmm means: (-1)^s 2^(e - 7) (1 + m / 8), and 2^-6 m / 8 where e = 0."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


MAGNITUDES = [e4m3(code) for code in range(0x7F)]


def blocks_of(shape, size=BLOCK):
    """((block row, block column), its slice of the matrix) of every block."""
    for row in range(0, shape[0], size):
        for column in range(0, shape[1], size):
            yield (row // size, column // size), (slice(row, row + size), slice(column, column + size))


def dequantized(codes: torch.Tensor, scale: torch.Tensor, size=BLOCK) -> torch.Tensor:
    """Block by block: the product in float64, which is exact, rounded to fp32 and then to bf16."""
    numbers = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    for (i, j), place in blocks_of(codes.shape, size):
        out[place] = (numbers[codes[place].long()] * float(scale[i, j])).float().bfloat16()
    return out


def nearest(value: float) -> float:
    """The E4M3 number nearest to a value, of two as near the one of even mantissa; beyond the largest, the largest."""
    size = abs(value)
    above = min(bisect_left(MAGNITUDES, size), len(MAGNITUDES) - 1)
    best = min((max(above - 1, 0), above), key=lambda code: (abs(MAGNITUDES[code] - size), code & 1))
    return math.copysign(MAGNITUDES[best], value)


def quantized(weight: torch.Tensor, size=BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers [out, in] in units of their block's scale, scales) with one loop over blocks and one over elements."""
    numbers = torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(tuple(-(-length // size) for length in weight.shape))
    for at, place in blocks_of(weight.shape, size):
        block = weight[place].float().numpy()
        largest = np.float32(max(abs(float(value)) for value in block.flat))
        scales[at] = scale = float(largest / np.float32(E4M3_MAX)) if largest else 1.0
        units = [nearest(float(value / np.float32(scale))) for value in block.flat]
        numbers[place] = torch.tensor(units, dtype=torch.float64).view(block.shape)
    return numbers, scales


def random_codes(shape, seed=0):
    """Bytes of every finite E4M3 number, both zeros and the subnormal ones as likely as the others."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    codes = torch.tensor(FINITE, dtype=torch.uint8)
    return codes[torch.randint(len(FINITE), shape, generator=generator)]


def random_scales(shape, exponents=(-12, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = exponents
    return torch.exp2(low + (high - low) * torch.rand(scale_shape(shape), generator=generator))


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal with the sign of zero."""
    return ours.shape == theirs.shape and bool((ours.view(torch.uint8) == theirs.view(torch.uint8)).all())


def fp8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn)


def test_the_reference_knows_the_format():
    """The numbers of the format's definition: largest 448, smallest normal 2^-6, smallest subnormal 2^-9."""
    assert (MAGNITUDES[0x7E], MAGNITUDES[0x08], MAGNITUDES[0x01]) == (448.0, 2.0**-6, 2.0**-9)
    assert len({e4m3(code) for code in FINITE}) == 253  # 254 codes, of which two are zero
    assert (nearest(1e9), nearest(-17.0), nearest(0.0)) == (448.0, -16.0, 0.0)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("exponents", [(-12, 4), (7, 9), (60, 119), (-140, -100)], ids=str)
def test_dequantize_equals_the_reference(shape, exponents):
    codes, scale = random_codes(shape), random_scales(shape, exponents)
    assert same_bits(dequantize(fp8(codes), scale), dequantized(codes, scale))


@pytest.mark.parametrize("exponent", [-149, -130, -7, 0, 7, 8, 9, 100, 119])
def test_every_finite_code_at_scales_of_every_size(exponent):
    """2^8 and more overflow once the exponents' biases are made up for in the scale."""
    codes = torch.tensor(FINITE, dtype=torch.uint8)[None]
    scale = torch.full(scale_shape(codes.shape), 2.0**exponent)
    expected = torch.tensor([[e4m3(code) * 2.0**exponent for code in FINITE]], dtype=torch.float64)
    assert same_bits(dequantize(fp8(codes), scale), expected.float().bfloat16())


def test_signs_of_zero_and_subnormal_numbers_stay():
    codes = torch.tensor([[0x00, 0x80, 0x01, 0x81, 0x07, 0x87]], dtype=torch.uint8)
    values = dequantize(fp8(codes), torch.ones(1, 1))
    assert values.tolist() == [[0.0, 0.0, 2.0**-9, -(2.0**-9), 7 * 2.0**-9, -7 * 2.0**-9]]
    assert torch.signbit(values).tolist() == [[False, True] * 3]
    again, _ = quantize(values, torch.ones(1, 1))
    assert torch.equal(again.view(torch.uint8), codes)


def test_one_large_scale_leaves_the_other_blocks_of_its_strip_exact():
    codes = random_codes((128, 384))
    scale = torch.tensor([[2.0**-20, 3.0 * 2**30, 1.1]])
    assert same_bits(dequantize(fp8(codes), scale), dequantized(codes, scale))


def test_dequantize_into_memory_that_is_given():
    codes, scale = random_codes((200, 300)), random_scales((200, 300))
    out = torch.full((200, 300), 7.0, dtype=torch.bfloat16)
    assert dequantize(fp8(codes), scale, out) is out
    assert same_bits(out, dequantized(codes, scale))


def test_the_reference_tells_another_block_size():
    """Negative control: 64 x 64 blocks, and scales taken column by column, give other numbers."""
    codes, scale = random_codes((200, 300)), random_scales((256, 384))
    scale_64 = torch.nn.functional.pad(scale, (0, 2, 0, 2), value=1.0)
    ours = dequantize(fp8(codes), scale[:2, :3].contiguous())
    assert same_bits(ours, dequantized(codes, scale))
    assert not same_bits(ours, dequantized(codes, scale_64, size=64))
    assert not same_bits(ours, dequantized(codes, scale[:2, :2].T.repeat(1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (127, 129), (130, 257)])
def test_quantize_equals_the_reference(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    values, scales = quantize(weight)
    numbers, expected = quantized(weight)
    assert torch.equal(scales, expected)
    assert torch.equal(values.double(), numbers)
    if max(shape) > 64:  # negative control: smaller blocks take other scales
        assert not torch.equal(quantized(weight, size=64)[1][: scales.shape[0], : scales.shape[1]], scales)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 1000))
def test_scale_and_error_of_every_block(rows, columns, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).bfloat16()
    values, scales = quantize(weight)
    assert scales.shape == scale_shape((rows, columns)) == (-(-rows // 128), -(-columns // 128))
    for at, place in blocks_of((rows, columns)):
        block, found = weight[place].double(), values[place].double().abs()
        assert scales[at] == weight[place].abs().amax().float() / 448
        assert found.max() == 448
        # Half the distance to the next number: 2^(e - 4) of a number in [2^e, 2^(e + 1)), 2^-10 below the normal ones.
        half = torch.where(found >= 2.0**-6, torch.exp2(found.clamp(min=2.0**-6).log2().floor() - 4), 2.0**-10)
        error = (values[place].double() * float(scales[at]) - block).abs()
        assert bool((error <= half * float(scales[at]) * (1 + 2.0**-20)).all())


def test_a_block_of_zeros_has_scale_one():
    weight = torch.zeros(130, 130)
    weight[129, 129] = -3.5
    weight[0, 1] = -0.0
    values, scales = quantize(weight)
    assert scales.tolist() == [[1.0, 1.0], [1.0, float(torch.tensor(3.5) / 448)]]
    assert values[:128].float().abs().max() == 0
    assert values[129, 129].float() == -448
    assert bool(torch.signbit(values.float())[0, 1])


def test_edge_blocks_are_as_if_padded_with_zeros():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(weight, (0, 84, 0, 56))
    values, scales = quantize(weight)
    padded_values, padded_scales = quantize(padded)
    assert torch.equal(scales, padded_scales)
    assert torch.equal(values.view(torch.uint8), padded_values[:200, :300].contiguous().view(torch.uint8))
    # negative control: any other padding shows in the scales of the edge
    filled = torch.nn.functional.pad(weight, (0, 84, 0, 56), value=9.0)
    assert (quantize(filled)[1] != scales).tolist() == [[False, False, True], [True, True, True]]


@pytest.mark.parametrize("shape", SIZES)
def test_what_came_from_a_bf16_weight_comes_back_with_its_scales(shape):
    """bf16 -> FP8 -> bf16 -> FP8: the largest of a block is a bf16 number, so its scale needs no help."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    values, scales = quantize(weight)
    again, same_scales = quantize(dequantize(values, scales))
    assert same_bits(again, values)
    assert torch.equal(same_scales, scales)
    assert not torch.equal(dequantize(values, scales), weight) or weight.numel() == 1  # it was rounded, but only once


@pytest.mark.parametrize("shape", SIZES)
def test_arbitrary_scales_come_back_only_where_they_are_known(shape):
    codes, scale = random_codes(shape, seed=3), random_scales(shape)
    for _, place in blocks_of(shape):
        codes[place][0, 0] = 0xFE  # -448, as where the scale was made from the block's largest
    weight = dequantize(fp8(codes), scale)
    values, fresh = quantize(weight)
    assert torch.equal(values.view(torch.uint8), codes)
    assert torch.allclose(fresh, scale, rtol=2**-8, atol=0)
    assert not torch.equal(fresh, scale)
    values, known = quantize(weight, scale)
    assert torch.equal(values.view(torch.uint8), codes)
    assert torch.equal(known, scale)


def test_a_block_that_its_scale_does_not_fill_comes_back_only_with_its_scale():
    codes, scale = random_codes((130, 130)), random_scales((130, 130))
    codes[codes & 0x7F > 0x70] = 0x70  # 128 at most
    weight = dequantize(fp8(codes), scale)
    values, known = quantize(weight, scale)
    assert torch.equal(values.view(torch.uint8), codes)
    assert torch.equal(known, scale)
    values, fresh = quantize(weight)
    assert not torch.equal(values.view(torch.uint8), codes)
    assert bool((fresh < scale).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_changed_block_takes_a_scale_of_its_own(dtype):
    codes, scale = random_codes((300, 300)), random_scales((300, 300))
    codes[codes & 0x7F > 0x70] = 0x70  # 128 at most, so that no block would take the same scale by itself
    weight = dequantize(fp8(codes), scale).float()
    if dtype == torch.float32:
        weight = fp8(codes).float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :300]
    weight = weight.to(dtype)
    weight[130, 140] = 4.2 * scale[1, 1]  # in block (1, 1): between 4 and 4.5 at its scale
    values, scales = quantize(weight, scale)
    kept = torch.ones(3, 3, dtype=torch.bool)
    kept[1, 1] = False
    assert (scales == scale).tolist() == kept.tolist()
    fresh_values, fresh_scales = quantize(weight)
    assert scales[1, 1] == fresh_scales[1, 1]
    for at, place in blocks_of((300, 300)):
        expected = codes[place] if kept[at] else fresh_values.view(torch.uint8)[place]
        assert torch.equal(values.view(torch.uint8)[place], expected)


@pytest.mark.parametrize("useless", [math.nan, math.inf, 0.0, -1.0])
def test_a_known_scale_that_is_none_is_not_taken(useless):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    plain, with_known = quantize(weight), quantize(weight, torch.full((1, 1), useless))
    assert torch.equal(with_known[1], plain[1])
    assert same_bits(with_known[0], plain[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_refuses_what_fp8_cannot_hold(value, dtype):
    weight = torch.ones(129, 129, dtype=dtype)
    quantize(weight)  # the same without the value is taken
    weight[128, 128] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, 2.0**120])
def test_dequantize_refuses_a_scale_that_is_none(value):
    scale = torch.ones(2, 2)
    dequantize(fp8(random_codes((129, 129))), scale)
    scale[1, 1] = value
    with pytest.raises(ValueError, match="a scale is NaN, infinite or not positive"):
        dequantize(fp8(random_codes((129, 129))), scale)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_dequantize_refuses_nan(code):
    codes = random_codes((129, 129))
    codes[128, 128] = code
    with pytest.raises(ValueError, match="an FP8 value is NaN"):
        dequantize(fp8(codes), torch.full((2, 2), 2.0**20))


@pytest.mark.parametrize("largest", [2.0**-149, 627 * 2.0**-149, 2.0**-141, 2.0**-133, 2.0**-126])
def test_the_smallest_numbers_there_are_stay_numbers(largest):
    """Their scale would be below the smallest number of fp32, or is rounded far off."""
    weight = torch.tensor([[largest, 0.0, -largest]])
    values, scales = quantize(weight)
    assert bool((scales > 0).all())
    assert values.float().isfinite().all()
    assert values[0, 1].float() == 0
    assert dequantize(values, scales).float().abs().max() <= largest
