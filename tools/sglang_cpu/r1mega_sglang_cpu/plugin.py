"""Patches of SGLang 0.5.21 for a CPU without AMX instructions, applied through its own entry point for plugins.

Every process of a server calls `register` once, before it reads its arguments. File and line numbers are those of the
wheel of 0.5.21, below `sglang/srt`.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
from importlib import import_module
from importlib.metadata import version
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)

SGLANG = "0.5.21"


class PatchError(SystemExit):
    """A patch that does not fit. SGLang logs an Exception of a plugin and goes on; this ends the process."""


def register() -> None:
    """Apply all patches. Raises PatchError where SGLang is another version, or does not hold what a patch replaces."""
    if version("sglang") != SGLANG:
        raise PatchError(f"r1mega-sglang-cpu: patches SGLang {SGLANG}, found {version('sglang')}; install that version")
    absorbed_mla()
    plain_rope()
    experts_of_other_ranks()
    padded_sequence_length()
    host_memory_not_pinned()
    checksum_without_cuda()
    if multiprocessing.parent_process() is None:  # the server's first process, which starts the others
        forked_processes()


def absorbed_mla() -> None:
    """DeepSeek's attention over the compressed cache, for prefill as for decoding.

    models/deepseek_common/attention_backend_handler.py line 55: a backend without a handler gets triton's, which
    chooses plain multi-head attention for a prefill without prefix. That one writes the cache with a triton kernel.
    """
    registry = _get("models.deepseek_common.attention_backend_handler", "AttentionBackendRegistry")
    methods = _get("models.deepseek_common.attention_forward_methods.forward_methods", "AttnForwardMethod")
    if "torch_native" in _get_attribute(registry, "_handlers"):
        raise PatchError("r1mega-sglang-cpu: SGLang has a handler of MLA for torch_native of its own")
    registry.register("torch_native", lambda attention, forward_batch: methods.MLA)


def plain_rope() -> None:
    """DeepSeek models without YaRN.

    layers/rotary_embedding/factory.py line 480: on a CPU MLA's rope must be `deepseek_yarn`. `get_rope`, which every
    other model takes on a CPU as well, makes the plain one.
    """
    factory = _module("layers.rotary_embedding.factory")
    get_rope, get_rope_cpu = _get_attribute(factory, "get_rope"), _get_attribute(factory, "get_rope_cpu")

    @functools.wraps(get_rope_cpu)
    def either(*arguments: Any, **options: Any) -> Any:
        # Both take the same arguments in the same order, up to the device that only the second has.
        names = ("head_size", "rotary_dim", "max_position", "base", "is_neox_style", "rope_scaling", "dtype")
        names += ("partial_rotary_factor", "device")
        given = dict(zip(names, arguments, strict=False)) | options
        if given.get("rope_scaling") is not None:
            return get_rope_cpu(**given)
        given.pop("device", None)
        return get_rope(**given)

    factory.get_rope_cpu = either


def experts_of_other_ranks() -> None:
    """Expert parallelism.

    layers/moe/token_dispatcher/standard.py line 226 gives the experts of other ranks the number -1, which
    layers/moe/fused_moe_native.py line 77 takes as an index. SGLang's own function runs here over the pairs of token
    and expert that are this rank's, as tokens with a single expert each.
    """
    module = _module("layers.moe.fused_moe_native")
    native = _get_attribute(module, "moe_forward_native")

    @functools.wraps(native)
    def local_only(layer: Any, x: Any, topk_output: Any, moe_runner_config: Any) -> Any:
        weights, ids = topk_output.topk_weights, topk_output.topk_ids
        if not (ids < 0).any():
            return native(layer, x, topk_output, moe_runner_config)
        tokens, slots = (ids >= 0).nonzero(as_tuple=True)
        output = x.new_zeros(x.shape)
        if len(tokens):
            single = topk_output._replace(
                topk_weights=weights[tokens, slots].unsqueeze(1), topk_ids=ids[tokens, slots].unsqueeze(1)
            )
            output.index_add_(0, tokens, native(layer, x[tokens], single, moe_runner_config).to(output.dtype))
        return output

    module.moe_forward_native = local_only


def padded_sequence_length() -> None:
    """Data-parallel attention, which pads the batches of the ranks to one size.

    model_executor/forward_batch_info.py line 1801 asks the backend for the length of the padding sequences, and
    layers/attention/torch_native_backend.py has no answer. 1 is what the backend for AMX says, in its line 158.
    """
    backend = _get("layers.attention.torch_native_backend", "TorchNativeAttnBackend")
    name = "get_cpu_graph_seq_len_fill_value"
    if hasattr(backend, name):
        raise PatchError(f"r1mega-sglang-cpu: SGLang has {backend.__name__}.{name} of its own")
    setattr(backend, name, lambda self: 1)


def host_memory_not_pinned() -> None:
    """Buffers on the host, such as those that routed experts are returned from.

    mem_cache/pool_host/common.py line 140 registers them with the CUDA runtime, whatever the device.
    """
    module = _module("mem_cache.pool_host.common")
    _get_attribute(module, "_cuda_host_register")
    module._cuda_host_register = lambda buffer, registration_granularity_bytes=None: None


def checksum_without_cuda() -> None:
    """`/weights_checker` with the action checksum.

    utils/weight_checker.py, `_compute_checksum`, waits for the GPU before it reads the clock.
    """
    checker = _get("utils.weight_checker", "WeightChecker")
    compute = _get_attribute(checker, "_compute_checksum")

    @functools.wraps(compute)
    def without_cuda(*arguments: Any, **options: Any) -> Any:
        with mock.patch("torch.cuda.synchronize", lambda device=None: None):
            return compute(*arguments, **options)

    checker._compute_checksum = without_cuda


def forked_processes() -> None:
    """Schedulers and detokenizer as forks of the server's first process, which has imported all that they need.

    entrypoints/engine.py line 1890 has each start anew, since CUDA cannot be forked, and import SGLang again. It starts
    them before it has threads. The controller of data parallelism has some when it starts its own.
    """
    engine = _module("entrypoints.engine")
    set_envs_and_config = _get_attribute(engine, "_set_envs_and_config")

    @functools.wraps(set_envs_and_config)
    def then_fork(server_args: Any) -> Any:
        result = set_envs_and_config(server_args)
        if server_args.dp_size > 1:
            return result
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            logger.warning("r1mega-sglang-cpu: %d threads, so each process imports SGLang anew", threads)
            return result
        multiprocessing.set_start_method("fork", force=True)
        # Ends the server; a process of its own would otherwise have it too.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL))
        return result

    engine._set_envs_and_config = then_fork


def _module(name: str) -> Any:
    try:
        return import_module(f"sglang.srt.{name}")
    except ImportError as error:
        raise PatchError(f"r1mega-sglang-cpu: cannot patch sglang.srt.{name}: {error}") from error


def _get(module: str, name: str) -> Any:
    return _get_attribute(_module(module), name)


def _get_attribute(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise PatchError(f"r1mega-sglang-cpu: {owner.__name__} has no {name} to patch; is this SGLang {SGLANG}?")
    return getattr(owner, name)
