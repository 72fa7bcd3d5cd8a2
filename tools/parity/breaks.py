"""Known mistakes, made on purpose: a comparison that does not notice them says nothing.

`layernorm_reduction`, `expert_reduction` and `down_projection` are faults of Megatron-Core 0.16.1 that r1mega mends, or
reductions it relies on; `counted_twice` is Transformer Engine's, and shows in the weights alone, as the gradient's norm
is wrong; `plain_slices` cuts sequences over context-parallel ranks otherwise than Megatron and Transformer Engine do;
`gate_up` is a wrong row of the parameter table; `late_choice` replays experts a token late. Of what stands in for
DeepEP's and apex's kernels, `lost_weights` brings back no gradient of the experts' weights, and `added_twice` adds a
weight's gradient twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace


@contextmanager
def broken(name: str | None) -> Iterator[None]:
    """Build and run models with the mistake `name` inside the block; None makes none."""
    undo = [] if name is None else _BREAKS[name]()
    try:
        yield
    finally:
        for module, attribute, original in undo:
            setattr(module, attribute, original)


def _gate_up() -> list:
    """Swap gate_proj and up_proj wherever the table joins them: the names still fit, the model is another."""
    from r1mega.models import shard
    from r1mega.models.param_map import GateUp

    slots_of = shard.slots_of

    def swapped(fields):
        return [replace(s, tensors=s.tensors[::-1]) if isinstance(s.op, GateUp) else s for s in slots_of(fields)]

    shard.slots_of = swapped
    return [(shard, "slots_of", slots_of)]


def _layernorm_reduction() -> list:
    """Leave out the sum, over tensor ranks that each hold a part of the sequence, of what they all hold whole."""
    # Its package exports a function of the same name.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module._allreduce_non_tensor_model_parallel_grads
    module._allreduce_non_tensor_model_parallel_grads = lambda *_args, **_kwargs: None
    return [(module, "_allreduce_non_tensor_model_parallel_grads", original)]


def _expert_reduction() -> list:
    """Upstream fault two: with tp > 1, ep = 1 and etp = 1 Megatron takes expert weights for dense ones."""
    from r1mega.models import build

    original = build.mark_expert_parameters

    def as_megatron_marks_them(model) -> None:
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.allreduce = model.config.expert_model_parallel_size == 1

    build.mark_expert_parameters = as_megatron_marks_them
    return [(build, "mark_expert_parameters", original)]


def _down_projection() -> list:
    """Upstream fault one: MLA's down-projections column-parallel and gathered, as in Megatron's local spec."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import multi_latent_attention

    from r1mega.models import layer_spec, shard
    from r1mega.models.param_map import Cut

    slots_of, ours, theirs = shard.slots_of, layer_spec.DuplicatedLinear, multi_latent_attention.Linear

    def cut(fields):
        return [
            replace(slot, op=Cut(0), axis="tp") if "_down_proj." in slot.name else slot for slot in slots_of(fields)
        ]

    shard.slots_of = cut
    layer_spec.DuplicatedLinear = ColumnParallelLinear
    return [
        (shard, "slots_of", slots_of),
        (layer_spec, "DuplicatedLinear", ours),
        (multi_latent_attention, "Linear", theirs),
    ]


def _late_choice() -> list:
    """Send each token to the experts of the token before it."""
    from r1mega.train import routes

    original = routes.deal

    def late(items, choices, *arguments, **options):
        return original(items, [choice.roll(1, 0) for choice in choices], *arguments, **options)

    routes.deal = late
    return [(routes, "deal", original)]


def _plain_slices() -> list:
    """Give each context-parallel rank one slice of every sequence, not an early and a late one."""
    from r1mega.models import attention

    original = attention.context_slices

    def plain(lengths, cp, cp_rank) -> list[int]:
        found, start = [], 0
        for length in lengths:
            begin = start + cp_rank * (length // cp)
            found += range(begin, begin + length // cp)
            start += length
        return found

    attention.context_slices = plain
    return [(attention, "context_slices", original)]


def _counted_twice() -> list:
    """Take what every tensor rank holds whole of MLA for parts of one matrix, as Transformer Engine does."""
    from r1mega.models import shard

    original = shard._mark

    def as_transformer_engine_marks_them(parameter, slot) -> None:
        original(parameter, slot)
        parameter.tensor_model_parallel |= "_down_proj." in slot.name

    shard._mark = as_transformer_engine_marks_them
    return [(shard, "_mark", original)]


def _lost_weights() -> list:
    """Add up what experts return of a token, and leave out what belongs to their weights."""
    from parity.stand_ins.deep_ep import Buffer

    combine = Buffer.combine

    def without_weights(self, x, handle, topk_weights=None, **when):
        combined, weights, event = combine(self, x, handle, topk_weights, **when)
        return combined, None if weights is None else weights * 0, event

    Buffer.combine = without_weights
    return [(Buffer, "combine", combine)]


def _added_twice() -> list:
    """Add the gradient of a weight to its sum, and once more."""
    module = importlib.import_module("fused_weight_gradient_mlp_cuda")
    original = module.wgrad_gemm_accum_fp32

    def twice(*tensors) -> None:
        original(*tensors)
        original(*tensors)

    module.wgrad_gemm_accum_fp32 = twice
    return [(module, "wgrad_gemm_accum_fp32", original)]


_BREAKS = {
    "added_twice": _added_twice,
    "lost_weights": _lost_weights,
    "counted_twice": _counted_twice,
    "plain_slices": _plain_slices,
    "late_choice": _late_choice,
    "gate_up": _gate_up,
    "layernorm_reduction": _layernorm_reduction,
    "expert_reduction": _expert_reduction,
    "down_projection": _down_projection,
}
NAMES = tuple(_BREAKS)
