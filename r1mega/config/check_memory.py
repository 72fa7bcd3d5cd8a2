"""Rules of what is computed again instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from r1mega.config.choices import LayerSpec, Mtp, Recompute
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

# What can be computed again alone; the last three need Transformer Engine, which then frees their outputs too.
RECOMPUTED = ("core_attn", "mlp", "moe", "shared_experts")
RECOMPUTED_BY_TE = (*RECOMPUTED, "mla_up_proj", "layernorm", "moe_act")


def check_memory(config: Config) -> Iterator[Fault]:
    """What the configuration alone tells."""
    memory, model, on_te = config.memory, config.model, config.device.layer_spec is LayerSpec.te
    if memory.recompute is Recompute.full and model.mtp is Mtp.train and memory.recompute_num_layers > 1:
        constraint = "the multi-token-prediction layer is one layer, and is trained here"
        yield Fault("memory.recompute_num_layers", str(memory.recompute_num_layers), constraint, "set it to 1")
    if memory.recompute is not Recompute.selective:
        return
    allowed = RECOMPUTED_BY_TE if on_te else RECOMPUTED
    for name in memory.recompute_modules:
        if name not in allowed:
            constraint = f"must be among {', '.join(allowed)} with device.layer_spec={config.device.layer_spec}"
            yield Fault("memory.recompute_modules", name, constraint, "take it out of the list")
    if "moe" not in memory.recompute_modules:
        return
    # The router is asked again in the backward pass, when the tokens at hand are those of another micro-batch.
    if model.router_balance_coef or model.moe_router_bias_update_rate:
        constraint = "the router counts tokens by sequence, which it cannot while its module is recomputed alone"
        remedy = "recompute whole layers (memory.recompute=full), or freeze the router's balance"
        yield Fault("memory.recompute_modules", "moe", constraint, remedy)
    elif config.rollout.router_replay:
        constraint = "the router replays by token, which it cannot while its module is recomputed alone"
        remedy = "recompute whole layers (memory.recompute=full), or set rollout.router_replay=false"
        yield Fault("memory.recompute_modules", "moe", constraint, remedy)


def check_recomputed_layers(config: Config, chunk_layers: Sequence[int]) -> Iterator[Fault]:
    """Layers are recomputed in groups that divide every chunk of the pipeline, whose layers these are."""
    memory = config.memory
    group = memory.recompute_num_layers
    if memory.recompute is Recompute.full and any(count % group for count in chunk_layers):
        constraint = f"must divide the layers of every chunk of the pipeline, {sorted(set(chunk_layers))}"
        yield Fault("memory.recompute_num_layers", str(group), constraint, "set it to 1")
