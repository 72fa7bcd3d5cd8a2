"""Llama 2 and 3: grouped-query attention without biases."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Slot
from r1mega.models.tables import common


def slots(fields: HfFields) -> Iterator[Slot]:
    """Every parameter, in the order of the checkpoint."""
    yield common.embedding(fields)
    for layer in range(fields["num_hidden_layers"]):
        yield from common.grouped_query_layer(fields, layer, qkv_bias=False)
    yield from common.head(fields)
