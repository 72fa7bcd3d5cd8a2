"""apex's kernel that adds a weight's gradient into its fp32 sum (`fused_weight_gradient_mlp_cuda`), in plain torch."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import Tensor


def wgrad_gemm_accum_fp32(input_NI: Tensor, grad_output_NO: Tensor, main_grad_OI: Tensor) -> None:
    """Add the gradient of a linear layer's weight to its fp32 sum, in place."""
    main_grad_OI.addmm_(grad_output_NO.t().float(), input_NI.float())


def install() -> None:
    """Let `import fused_weight_gradient_mlp_cuda` find this."""
    module = ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32
    sys.modules[module.__name__] = module
