"""Linear layers whose products are those of FP8 blocks, emulated in plain torch: slow, for checking, on any device.

The arithmetic is Transformer Engine's `Float8BlockScaling` recipe, which follows DeepSeek-V3 (arXiv 2412.19437, section
3.3). Each of the three products takes both operands from bf16, in E4M3 with one scale a block:

    forward             y = x w^T       x in blocks of 1 x 128, w of 128 x 128
    gradient of x      dx = dy w       dy in blocks of 1 x 128, w in the same blocks as forward
    gradient of w      dw = dy^T x     dy and x in blocks of 128 x 1: 128 tokens, along which this product sums

A block that a matrix ends in is scaled as if it were padded with zeros. What a block gives back, FP8 value / scale, is
exact in fp32, so one fp32 product of such numbers is the blocks' own products summed in fp32, up to the order of the
sums; the result is rounded once, to the dtype of x. What stays as it is: embedding, head, router, norms, attention.

Differences from the paper: the scale is a power of two for weights as well, and x is quantised for dw from bf16 again
where V3 transposes what it has in FP8. From Transformer Engine: cuBLAS sums the products of a block in tensor cores,
which on Hopper keep fewer than fp32's bits (V3 section 3.3.2 names 14); here they are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from r1mega.models.fp8_blocks import BLOCK, E4M3_MAX

FORMAT = torch.float8_e4m3fn
_EXPONENT = 0x7F800000  # the bits of the exponent in fp32


def block_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor that takes blocks into E4M3's range, a power of two in fp32, of their largest absolute values in fp32.

    448 / largest rounded down, or the largest power of two of `dtype`, that of the operand, where that is infinite; 1
    for a block of zeros or one that holds an infinity or NaN (Transformer Engine, `compute_scale_from_amax` with its
    default of powers of two, which NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 would switch off).
    """
    scale = (E4M3_MAX / largest).clamp_(max=torch.finfo(dtype).max)
    scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return torch.where((largest > 0) & torch.isfinite(largest), scale, 1.0)


def round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """fp32 numbers rounded to the nearest that E4M3 holds, ties to even, beyond 448 to 448; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(FORMAT).float()


def in_blocks(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What FP8 blocks of rows x columns make of a matrix [m, n]: FP8 value / scale, in fp32 [m, n]."""
    m, n = matrix.shape
    padded = torch.nn.functional.pad(matrix.float(), (0, -n % columns, 0, -m % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = block_scale(tiles.abs().amax((1, 3), keepdim=True), matrix.dtype)
    values = round_to_e4m3(tiles * scale).mul_(scale.reciprocal_())
    return values.view(padded.shape)[:m, :n]


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product [m, n] of what blocks hold, [m, k] and [k, n], in fp32. TF32 would do no harm: they have 4 bits."""
    return left @ right


class _Fp8Product(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None -> x weight^T + bias [..., out] in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gather: dist.ProcessGroup | None,
        reduce: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """`gather`: the ranks that x is first gathered from, along its first dimension. `reduce`: those that the
        gradient of x is summed over."""
        ctx.gather, ctx.reduce = gather, reduce
        # With a frozen weight x is of no more use.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        whole = x if gather is None else _gathered(x, gather)
        product = multiply(in_blocks(_matrix(whole), 1, BLOCK), in_blocks(weight, BLOCK, BLOCK).t())
        if bias is not None:
            product += bias.float()
        return product.to(x.dtype).view(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = communication = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(in_blocks(_matrix(grad), 1, BLOCK), in_blocks(weight, BLOCK, BLOCK)).to(grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
            if ctx.gather is not None:
                whole, grad_x = grad_x, grad_x.new_empty(grad.shape[0] // ctx.gather.size(), *grad_x.shape[1:])
                communication = dist.reduce_scatter_tensor(grad_x, whole, group=ctx.gather, async_op=True)
            elif ctx.reduce is not None:
                communication = dist.all_reduce(grad_x, group=ctx.reduce, async_op=True)
        if ctx.needs_input_grad[1]:
            x = x if ctx.gather is None else _gathered(x, ctx.gather)
            grad_weight = multiply(in_blocks(_matrix(grad), BLOCK, 1).t(), in_blocks(_matrix(x), BLOCK, 1))
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _matrix(grad).sum(0)
        if communication is not None:
            communication.wait()
        return grad_x, grad_weight, grad_bias, None, None


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gather: dist.ProcessGroup | None = None,
    reduce: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """x weight^T + bias [..., out] of x [..., in], weight [out, in], as FP8 blocks compute it and its gradients.

    `gather`: the ranks that each hold a part of the sequence, x's first dimension, of which the whole is worked on.
    `reduce`: the ranks that the gradient of x is summed over.
    """
    return _Fp8Product.apply(x, weight, bias, gather, reduce)


class _Fp8Products:
    """What Megatron's parallel linear layers multiply with."""

    def _forward_impl(
        self,
        input: torch.Tensor,  # Megatron's name for it
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        grad_output_buffer: list[torch.Tensor] | None = None,
        wgrad_deferral_limit: int | None = None,
    ) -> torch.Tensor:
        assert not gradient_accumulation_fusion and grad_output_buffer is None and wgrad_deferral_limit is None
        return fp8_linear(
            input,
            weight,
            bias,
            gather=tp_group if sequence_parallel and tp_group.size() > 1 else None,
            reduce=tp_group if allreduce_dgrad else None,
        )


class Fp8ColumnParallelLinear(_Fp8Products, ColumnParallelLinear):
    """Megatron's linear layer cut by rows, in emulated FP8."""


class Fp8RowParallelLinear(_Fp8Products, RowParallelLinear):
    """Megatron's linear layer cut by columns, in emulated FP8."""


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[tokens, width] of a tensor [..., width]."""
    return tensor.reshape(-1, tensor.shape[-1])


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all ranks of the group, along the first dimension."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole
