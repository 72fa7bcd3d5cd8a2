"""Is the checkpoint of a run the model that the run is a recipe for? Its config.json against the published card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from r1mega.config.faults import Fault
from r1mega.config.schema import Config
from r1mega.models import cards, hf_fields
from r1mega.models.hf_fields import HfFields

# What tools/convert_checkpoint.py can set: the weights stay those of the model.
_SETTABLE = ("max_position_embeddings", "rope_theta", "tie_word_embeddings")
# Of the fields that make a model's numbers: these only fill random weights.
_FREE = {"initializer_range"}


def card_fields(config: Config) -> HfFields | None:
    """The published model that `model.card` names; None where it names none, or one that there is no card of."""
    card = config.model.card
    return hf_fields.read(cards.folder(card), allow_fp8=True) if card in cards.names() else None


def check_card(config: Config, found: HfFields | None) -> Iterator[Fault]:
    """Every field of `found`, model.hf's config.json where it can be read, that is not the card's."""
    card = config.model.card
    if card is None:
        return
    if card not in cards.names():
        constraint = f"must be one of {', '.join(cards.names())}"
        yield Fault("model.card", card, constraint, "choose one of them, or set model.card=null")
        return
    wanted = card_fields(config)
    if found is None or wanted is None:
        return
    if found.family != wanted.family:
        yield Fault("model.hf", f"model_type {found.family}", f"model.card={card} is {wanted.family}", _other(card))
        return
    ours, theirs = _shape(found), _shape(wanted)
    for name in sorted(ours.keys() | theirs.keys()):
        got, expected = ours.get(name), theirs.get(name)
        if got != expected:
            constraint = f"model.card={card} has {json.dumps(expected)}"
            yield Fault("model.hf", f"{name}={json.dumps(got)}", constraint, _remedy(name, expected, card, config))


def _shape(fields: HfFields) -> dict[str, Any]:
    """What makes the numbers of a model, one spelling each; an absent optional number is what follows from others."""
    rope = {name: value for name, value in fields.rope.items() if name != "rope_theta"}
    names = hf_fields.honoured(fields.family) - _FREE - {"rope_scaling", "rope_parameters", "rope_theta", "head_dim"}
    values = {name: fields.values.get(name) for name in names}
    extra = {} if fields.is_moe else {"head_dim": fields.head_dim}
    return values | extra | {"rope_theta": float(fields.rope["rope_theta"]), "rope_scaling": _numbers(rope)}


def _numbers(rope: dict[str, Any]) -> dict[str, Any]:
    return {name: float(value) if isinstance(value, int) else value for name, value in rope.items()}


def _remedy(name: str, expected: Any, card: str, config: Config) -> str:
    if name not in _SETTABLE or (name == "tie_word_embeddings" and expected):
        return _other(card)
    kept = f"--hf {config.model.hf} --out DIR --dtype bf16"
    change = f"--set {name}={json.dumps(expected)}"
    return f"python tools/convert_checkpoint.py hf-to-hf {kept} {change}, or set model.card=null"


def _other(card: str) -> str:
    return f"name a checkpoint of {card}, or set model.card=null"
