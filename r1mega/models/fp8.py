"""What FP8 matrix products ask of a model, a layout and a micro-batch. No torch."""

from __future__ import annotations

from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout

WIDTH = 16  # both widths of a product in FP8 divide by it (cuBLAS)
TOKENS = 128  # tokens of a micro-batch on a rank divide by it: whole blocks of 1 x 128 also where they are transposed
GATHERED = 128  # widths of what tensor ranks gather of each other's tokens, which goes in whole blocks


def problems(fields: HfFields, layout: Layout) -> list[str]:
    """Widths that FP8 products cannot take, as `field: got VALUE; CONSTRAINT; REMEDY`."""
    widths = {
        "hidden_size": fields["hidden_size"],
        "intermediate_size / tp": fields["intermediate_size"] // layout.tp,
        "num_attention_heads x width / tp": _head_widths(fields) // layout.tp,
    }
    if fields.is_moe:
        widths["moe_intermediate_size / etp"] = fields["moe_intermediate_size"] // layout.etp
        widths["kv_lora_rank + qk_rope_head_dim"] = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
        if fields["q_lora_rank"] is not None:
            widths["q_lora_rank"] = fields["q_lora_rank"]
    found = [
        f"precision.fp8: got {name} = {width}; must be a multiple of {WIDTH}, which FP8 matrix products divide; "
        "choose another layout or precision=bf16"
        for name, width in widths.items()
        if width % WIDTH
    ]
    gathered = ("hidden_size", "q_lora_rank", "kv_lora_rank") if fields.is_moe else ("hidden_size",)
    found += [
        f"precision.fp8: got {name} = {fields[name]} and tp = {layout.tp}; must be a multiple of {GATHERED}, as tensor "
        "ranks gather each other's tokens in whole blocks; set parallel.tp=1 or precision=bf16"
        for name in gathered
        if layout.tp > 1 and fields[name] is not None and fields[name] % GATHERED
    ]
    return found


def _head_widths(fields: HfFields) -> int:
    width = fields["v_head_dim"] if fields.is_moe else fields.head_dim
    return fields["num_attention_heads"] * width
