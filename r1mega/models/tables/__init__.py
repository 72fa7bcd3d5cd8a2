"""One table per model family: every parameter declared once, for loading, publishing and conversion alike."""

from __future__ import annotations

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Placement, Slot
from r1mega.models.tables import deepseek_v3, llama, qwen2
from r1mega.parallel.layout import Layout

_TABLES = {"deepseek_v3": deepseek_v3.slots, "qwen2": qwen2.slots, "llama": llama.slots}


def slots_of(fields: HfFields) -> list[Slot]:
    """Every slot of the model, in the one global order that all walks over its weights take."""
    return list(_TABLES[fields.family](fields))


def placement_of(fields: HfFields, layout: Layout) -> Placement:
    """Where the slots stand in a layout."""
    return Placement(
        layout=layout,
        num_layers=fields["num_hidden_layers"],
        num_experts=fields["n_routed_experts"] if fields.is_moe else 0,
        num_dense_layers=fields["first_k_dense_replace"] if fields.is_moe else fields["num_hidden_layers"],
        has_mla=fields.family == "deepseek_v3",
    )
