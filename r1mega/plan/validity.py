"""What makes a plan invalid: every rule of the configuration that does not ask for files, packages or devices here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1mega.config.check import check, longest_response
from r1mega.config.check_cluster import server_ranks
from r1mega.config.check_memory import check_recomputed_layers
from r1mega.config.check_reward_model import MODELS
from r1mega.config.choices import Loop, Mtp
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.models import cards, fp8, hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout
from r1mega.plan import rows


def model_of(config: Config) -> HfFields:
    """The shape of the model: model.hf's config.json, else the card's; a reward model's with a score for its logits.

    Raises:
        ConfigError: neither is there, or what is there is not honoured.
    """
    model, drops = config.model, config.model.mtp is Mtp.drop
    has_checkpoint = bool(model.hf) and (Path(model.hf) / "config.json").is_file()
    if has_checkpoint or model.card:
        try:
            found = hf_fields.read(
                model.hf if has_checkpoint else cards.folder(model.card), drop_mtp=drops, allow_fp8=True
            )
        except ValueError as error:
            raise ConfigError([f"model.hf: {line}" for line in str(error).splitlines()]) from error
        return found.as_reward_model() if config.stage.loop is Loop.reward_model else found
    constraint = "must be a checkpoint directory with a config.json, where model.card names no published model"
    remedy = f"set model.hf=DIR, or model.card to one of {', '.join(cards.names())}"
    raise ConfigError([Fault("model.hf", model.hf or "nothing", constraint, remedy)])


def require(config: Config, fields: HfFields, also: Sequence[Fault | str] = ()) -> Layout:
    """The layout of a configuration that can be. Raises ConfigError with every reason why it cannot, and `also`."""
    layout = Layout.of(**config.parallel.sizes())
    faults = problems(config, fields, layout)
    known = {str(fault) for fault in faults}
    faults += [fault for fault in also if str(fault) not in known]
    if faults:
        raise ConfigError(faults)
    return layout


def problems(config: Config, fields: HfFields, layout: Layout) -> list[Fault | str]:
    """Every reason why this cannot be."""
    faults: list[Fault | str] = [*check(config, here=False), *rows.missing(config)]
    found = layout.problems(fields.shape())
    faults += [problem for problem in found if not any(problem == str(fault) for fault in faults)]
    if not found:
        faults += check_recomputed_layers(config, layout.chunk_layers(fields["num_hidden_layers"]))
        faults += fp8.problems(fields, layout) if config.precision.fp8 else []
        faults += _served(config, fields)
    field, longest = longest_response(config)
    if longest > fields["max_position_embeddings"]:
        constraint = f"must be at most max_position_embeddings={fields['max_position_embeddings']}"
        faults.append(Fault(field, str(longest), constraint, "lower it or use a model for longer texts"))
    return faults


def asked_models(config: Config, fields: HfFields) -> dict[str, HfFields]:
    """The frozen reward models of an RL run: the config.json of each that is there, else the policy's own shape.

    Raises:
        ConfigError: what is there is not honoured.
    """
    found = {}
    for name in MODELS if config.stage.loop is Loop.rl else ():
        path = getattr(config.reward, f"{name}_model")
        if not getattr(config.reward, name):
            continue
        found[name] = fields.as_reward_model()
        if path and (Path(path) / "config.json").is_file():
            try:
                found[name] = hf_fields.read(path).as_reward_model()
            except ValueError as error:
                field = f"reward.{name}_model"
                raise ConfigError([f"{field}: {line}" for line in str(error).splitlines()]) from error
    return found


def _served(config: Config, fields: HfFields) -> list[Fault]:
    """Cuts of the servers that the model does not divide by."""
    sglang = config.sglang
    if not server_ranks(config):
        return []
    found, heads = [], sglang.tp // sglang.attn_dp if sglang.tp % sglang.attn_dp == 0 else 1
    if fields["num_attention_heads"] % heads:
        constraint = f"tp / attn_dp must divide the model's num_attention_heads = {fields['num_attention_heads']}"
        found.append(Fault("sglang.tp", str(sglang.tp), constraint, "choose another, or raise sglang.attn_dp"))
    if fields.is_moe and (fields["n_routed_experts"] + sglang.redundant_experts) % sglang.ep:
        constraint = f"must divide n_routed_experts + redundant_experts of the model, {fields['n_routed_experts']}"
        found.append(Fault("sglang.ep", str(sglang.ep), constraint, "choose another"))
    return found
