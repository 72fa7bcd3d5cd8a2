"""What makes a plan invalid: every rule of the configuration that does not ask for files, packages or devices here."""

from __future__ import annotations

from pathlib import Path

from r1mega.config.check import check
from r1mega.config.choices import Loop, Mtp, Recompute
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.models import cards, fp8, hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout

# A plan is made anywhere: what these fields name need not be on this machine.
_ELSEWHERE = {"run.dir", "model.hf", "model.tokenizer", "data.train", "data.eval", "sglang.python"}
_NOT_INSTALLED = "is not installed"


def model_of(config: Config) -> HfFields:
    """The shape of the model: model.hf's config.json, else the card's.

    Raises:
        ConfigError: neither is there, or what is there is not honoured.
    """
    model, drops = config.model, config.model.mtp is Mtp.drop
    has_checkpoint = bool(model.hf) and (Path(model.hf) / "config.json").is_file()
    try:
        if has_checkpoint:
            return hf_fields.read(model.hf, drop_mtp=drops, allow_fp8=True)
        if model.card:
            return hf_fields.read(cards.folder(model.card), drop_mtp=drops, allow_fp8=True)
    except ValueError as error:
        raise ConfigError([f"model.hf: {line}" for line in str(error).splitlines()]) from error
    constraint = "must be a checkpoint directory with a config.json, where model.card names no published model"
    remedy = f"set model.hf=DIR, or model.card to one of {', '.join(cards.names())}"
    raise ConfigError([Fault("model.hf", model.hf or "nothing", constraint, remedy)])


def require(config: Config, fields: HfFields) -> Layout:
    """The layout of a configuration that can be. Raises ConfigError with every reason why it cannot."""
    layout = Layout.of(**config.parallel.sizes())
    faults = problems(config, fields, layout)
    if faults:
        raise ConfigError(faults)
    return layout


def problems(config: Config, fields: HfFields, layout: Layout) -> list[Fault | str]:
    """Every reason why this cannot be."""
    faults: list[Fault | str] = [
        fault for fault in check(config) if fault.field not in _ELSEWHERE and _NOT_INSTALLED not in fault.constraint
    ]
    if config.stage.loop not in (Loop.rl, Loop.sft):
        faults.append(Fault("stage.loop", str(config.stage.loop), "no plan is made of this loop", "plan rl or sft"))
    found = layout.problems(fields.shape())
    faults += [problem for problem in found if not any(problem == str(fault) for fault in faults)]
    if not found:
        faults += _recomputation(config, layout, fields["num_hidden_layers"])
        faults += fp8.problems(fields, layout) if config.precision.fp8 else []
        faults += _served(config, fields)
    longest = config.sft.max_length if str(config.stage.loop) == "sft" else config.rollout.max_tokens
    if longest > fields["max_position_embeddings"]:
        field = "sft.max_length" if str(config.stage.loop) == "sft" else "rollout.max_tokens"
        constraint = f"must be at most max_position_embeddings={fields['max_position_embeddings']}"
        faults.append(Fault(field, str(longest), constraint, "lower it or use a model for longer texts"))
    return faults


def _recomputation(config: Config, layout: Layout, num_layers: int) -> list[Fault]:
    memory, counts = config.memory, layout.chunk_layers(num_layers)
    group = memory.recompute_num_layers
    if memory.recompute is not Recompute.full or all(count % group == 0 for count in counts):
        return []
    constraint = f"must divide the layers of every chunk of the pipeline, {sorted(set(counts))}"
    return [Fault("memory.recompute_num_layers", str(group), constraint, "set it to 1")]


def _served(config: Config, fields: HfFields) -> list[Fault]:
    """Cuts of the servers that the model does not divide by."""
    sglang = config.sglang
    if str(config.rollout.engine) != "sglang" or str(config.stage.loop) != "rl":
        return []
    found, heads = [], sglang.tp // sglang.attn_dp if sglang.tp % sglang.attn_dp == 0 else 1
    if fields["num_attention_heads"] % heads:
        constraint = f"tp / attn_dp must divide the model's num_attention_heads = {fields['num_attention_heads']}"
        found.append(Fault("sglang.tp", str(sglang.tp), constraint, "choose another, or raise sglang.attn_dp"))
    if fields.is_moe and (fields["n_routed_experts"] + sglang.redundant_experts) % sglang.ep:
        constraint = f"must divide n_routed_experts + redundant_experts of the model, {fields['n_routed_experts']}"
        found.append(Fault("sglang.ep", str(sglang.ep), constraint, "choose another"))
    return found
