"""Emulated FP8 products against numpy: E4M3 by its definition, blocks cut by hand, sums in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from r1mega.models import fp8_linear
from r1mega.models.fp8_linear import block_scale, in_blocks, round_to_e4m3

# The sums of both sides are of the same exact products: fp32 against fp64, in units of the largest.
FP32_SUMS = 2e-6


def e4m3_values() -> np.ndarray:
    """[127] the numbers of the codes 0 to 126: 4 bits of exponent, biased by 7, and 3 of mantissa; 127 is NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


VALUES = e4m3_values()


def e4m3(numbers: np.ndarray) -> np.ndarray:
    """The nearest E4M3 number of each, that of the even code where two are as near."""
    size = np.abs(numbers)
    above = np.searchsorted(VALUES, size).clip(1, 126)
    to_lower, to_upper = size - VALUES[above - 1], VALUES[above] - size
    code = np.where(to_lower < to_upper, above - 1, above)
    code = np.where(to_lower == to_upper, above - above % 2, code)
    return np.sign(numbers) * VALUES[code]


def reference(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A matrix through FP8 blocks, one block at a time."""
    out = np.zeros(matrix.shape)
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            place = np.s_[top : top + rows, left : left + columns]
            largest = np.abs(matrix[place]).max()
            scale = 2.0 ** np.floor(np.log2(448 / largest)) if largest > 0 else 1.0
            out[place] = e4m3(matrix[place] * scale) / scale
    return out


def operands(tokens: int, width_in: int, width_out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and the gradient of their product, in bf16, with tokens and widths of very different sizes."""
    generator = torch.Generator().manual_seed(tokens + width_in + width_out)

    def spread(rows: int, columns: int) -> torch.Tensor:
        size = torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator)
        return (torch.randn(rows, columns, generator=generator) * (3 * size).exp2()).bfloat16()

    return spread(tokens, width_in), spread(width_out, width_in), spread(tokens, width_out)


def found(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype) -> list[np.ndarray]:
    """The product and its gradients, as the layers compute them."""
    x, weight = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight))
    y = fp8_linear.fp8_linear(x, weight)
    y.backward(grad.to(dtype))
    return [tensor.detach().double().numpy() for tensor in (y, x.grad, weight.grad)]


def expected(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[np.ndarray]:
    x, w, g = (tensor.double().numpy() for tensor in (x, weight, grad))
    in_w = reference(w, 128, 128)
    return [
        reference(x, 1, 128) @ in_w.T,
        reference(g, 1, 128) @ in_w,
        reference(g, 128, 1).T @ reference(x, 128, 1),
    ]


def worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> list[float]:
    """Of each result the largest difference, relative to the largest of its row: rows are of very different sizes."""
    return [
        float((np.abs(a - b).max(1) / np.abs(b).max(1).clip(1e-30)).max()) for a, b in zip(ours, theirs, strict=True)
    ]


SIZES = pytest.mark.parametrize(
    "size", [(128, 128, 128), (256, 384, 256), (1, 16, 16), (130, 144, 272), (300, 80, 129)], ids=str
)


@SIZES
def test_the_three_products_are_those_of_the_blocks(size):
    """In fp32 they are the reference's up to the order of sums."""
    case = operands(*size)
    assert max(worst(found(*case, torch.float32), expected(*case))) < FP32_SUMS


@SIZES
def test_results_are_rounded_once_to_bf16(size):
    """No number is further from the reference than half of bf16's last bit, 2^-8 of it, and the sums' own error."""
    case = operands(*size)
    for ours, theirs in zip(found(*case, torch.bfloat16), expected(*case), strict=True):
        room = 2.0**-8 * np.abs(theirs) * 1.001 + FP32_SUMS * np.abs(theirs).max(1, keepdims=True)
        assert (np.abs(ours - theirs) <= room).all()


def _per_tensor(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return in_blocks(matrix, *matrix.shape)


def _transposed(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return in_blocks(matrix, columns, rows)


def _small_weight_blocks(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return in_blocks(matrix, min(rows, 64), min(columns, 64)) if rows == columns else in_blocks(matrix, rows, columns)


@pytest.mark.parametrize(
    ("mistake", "which"), [(_per_tensor, (0, 1, 2)), (_transposed, (0, 1, 2)), (_small_weight_blocks, (0, 1))]
)
def test_other_blocks_are_noticed(monkeypatch, mistake, which):
    case = operands(256, 384, 256)
    monkeypatch.setattr(fp8_linear, "in_blocks", mistake)
    differences = worst(found(*case, torch.float32), expected(*case))
    assert min(differences[i] for i in which) > 100 * FP32_SUMS, differences


def test_fewer_bits_are_noticed(monkeypatch):
    case = operands(256, 384, 256)
    monkeypatch.setattr(fp8_linear, "FORMAT", torch.float8_e5m2)
    assert min(worst(found(*case, torch.float32), expected(*case))) > 0.01


def test_every_bf16_number_is_rounded_as_e4m3_says():
    """All of them, by its definition; every E4M3 number stays itself."""
    numbers = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[numbers.abs() <= 448]
    assert len(numbers) > 30_000
    rounded = round_to_e4m3(numbers)
    assert (rounded.double().numpy() == e4m3(numbers.double().numpy())).all()
    assert torch.equal(round_to_e4m3(torch.tensor(VALUES).float()), torch.tensor(VALUES).float())
    ties = torch.tensor((VALUES[1:] + VALUES[:-1]) / 2).float()
    assert (round_to_e4m3(ties).double().numpy() == VALUES[np.arange(1, 127) // 2 * 2]).all()


def test_beyond_the_range():
    numbers = torch.tensor([449.0, -1e30, torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_to_e4m3(numbers)[:4], torch.tensor([448.0, -448.0, 448.0, -448.0]))
    assert round_to_e4m3(numbers)[4].isnan()


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (448.0, 1.0),
        (449.0, 0.5),
        (224.0, 2.0),
        (225.0, 1.0),
        (1.0, 256.0),
        (0.0, 1.0),
        (torch.inf, 1.0),
        (torch.nan, 1.0),
        (1e-38, 2.0**127),  # 448 / 1e-38 is infinite in fp32
    ],
)
def test_scales_are_powers_of_two_below_448_over_the_largest(largest, scale):
    assert block_scale(torch.tensor([largest]), torch.bfloat16).tolist() == [scale]


def test_not_a_number_is_passed_on():
    """It must reach the gradient's norm, where a run stops."""
    x, weight, grad = operands(128, 128, 128)
    x[3, 5] = torch.nan
    y, _, grad_weight = found(x, weight, grad, torch.bfloat16)
    assert np.isnan(y[3]).all() and np.isfinite(y[4]).all()
    assert np.isnan(grad_weight[:, 5]).all() and np.isfinite(grad_weight[:, 6]).all()


def test_experts_without_tokens():
    y, grad_x, grad_weight = found(*operands(0, 32, 48), torch.bfloat16)
    assert y.shape == (0, 48) and grad_x.shape == (0, 32)
    assert grad_weight.shape == (48, 32) and not grad_weight.any()


def test_a_frozen_weight_has_no_gradient_and_does_not_hold_the_input():
    x, weight, grad = operands(128, 64, 32)
    x.requires_grad_()
    y = fp8_linear.fp8_linear(x, weight)
    assert [saved is None for saved in y.grad_fn.saved_tensors] == [True, False]
    y.backward(grad)
    assert weight.grad is None and x.grad.shape == x.shape


def test_the_bias_joins_before_the_result_is_rounded():
    x, weight, grad = operands(128, 64, 32)
    bias = torch.linspace(-3, 3, 32).bfloat16().requires_grad_()
    y = fp8_linear.fp8_linear(x, weight, bias)
    y.backward(grad)
    exact = fp8_linear.fp8_linear(x.float(), weight.float()) + bias
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(bias.grad, grad.sum(0))
