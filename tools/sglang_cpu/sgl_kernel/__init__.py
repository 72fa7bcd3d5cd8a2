"""Stands for SGLang's compiled CPU kernels, which PyPI has for no CPU without AMX instructions.

SGLang imports these names at the top of files that it needs for other reasons; what it runs without AMX is written in
torch. `_is_intel_amx_backend_available` (srt/utils/common.py line 338) asks `torch.ops.sgl_kernel`, and so keeps
finding no kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def _absent(name: str) -> Callable[..., NoReturn]:
    def kernel(*_arguments: Any, **_options: Any) -> NoReturn:
        raise RuntimeError(
            f"sgl_kernel.{name} stands for a compiled kernel: SGLang took a path that this environment does not have"
        )

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


# srt/mem_cache/allocation.py line 47
assign_req_to_token_pool_cpu = _absent("assign_req_to_token_pool_cpu")
# kernels/ops/kvcache/cache_move.py line 10
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
# kernels/ops/speculative/eagle.py line 10
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
# kernels/ops/speculative/multi_layer_eagle.py line 25
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")
# kernels/ops/speculative/cache_locs.py line 27 and srt/speculative/spec_utils.py line 87
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
# srt/speculative/eagle_worker_common.py line 46
assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
# srt/speculative/eagle_utils.py lines 61 and 64
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")
