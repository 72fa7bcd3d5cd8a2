"""The cells of the parity matrix: which family at which layout with which levers, and what is allowed to differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parity.case import Case, random_case, random_choices

# Another order of fp32 sums and other kernels; measured differences are some 1e-6. Adam divides by the root of the
# squared gradient, so where a gradient is near zero its rounding moves a weight by up to the learning rate: 5e-5 of a
# tensor was seen. For the same reason it hides most of a wrong norm, by which gradients are clipped: norms are compared
# as such, some 1e-6 apart.
MAX_LOGPROB_DIFF = 1e-4
MAX_GRADIENT_DIFF = 1e-3
MAX_NORM_DIFF = 1e-4
MAX_WEIGHT_DIFF = 3e-4
# Eight bits of mantissa in parameters and activations; 3.4e-2, 3.7e-2, 9.2e-3 and 4.5e-3 were seen. Weights of experts
# at tokens are rounded too: 5.5e-2 of the norm.
BF16_SLACK = {"max_abs_diff": 0.1, "max_rel_grad_diff": 0.1, "max_rel_norm_diff": 0.05, "max_rel_weight_diff": 0.01}
BF16_SLACK_OF_EXPERTS = BF16_SLACK | {"max_rel_norm_diff": 0.1}
MAX_BIAS_DIFF = 1e-6  # a bias moves by whole steps: a token counted wrongly would show as at least one

FAMILIES = ("deepseek_v3", "deepseek_v3_mtp", "deepseek_v3_replay", "qwen2", "llama")
LAYOUTS = (
    "1", "tp=2", "tp=4", "pp=2", "pp=4", "pp=2,vpp=2", "pp=2,stages=1+3", "pp=2,vpp=2,stages=2+1+1+0", "dp=2",
    "cp=2", "cp=4", "tp=2,pp=2", "tp=2,cp=2", "cp=2,pp=2", "tp=2,dp=2", "pp=2,dp=2", "ep=2,dp=2", "ep=4,dp=4",
    "tp=2,ep=2", "tp=2,etp=2", "cp=2,ep=2", "tp=2,ep=2,etp=2,dp=2", "tp=2,pp=2,ep=2", "pp=2,ep=2,dp=2",
    "tp=2,cp=2,ep=2", "tp=2,pp=2,ep=2,dp=2", "tp=2,cp=2,pp=2,ep=4", "tp=2,pp=2,vpp=2,ep=2",
)  # fmt: skip
DENSE_LAYOUTS = tuple(layout for layout in LAYOUTS if "ep=" not in layout and "etp=" not in layout)
# The family with the extra prediction layer goes through all; without it, where something else happens.
MOE_LAYOUTS = (
    "1", "tp=2", "tp=4", "pp=2", "pp=4", "pp=2,vpp=2", "pp=2,stages=1+3", "cp=2", "tp=2,pp=2", "ep=2,dp=2", "ep=4,dp=4",
    "tp=2,etp=2", "cp=2,ep=2", "tp=2,ep=2,etp=2,dp=2", "pp=2,ep=2,dp=2", "tp=2,pp=2,ep=2", "tp=2,cp=2,ep=2",
)  # fmt: skip
# Experts drawn at random and replayed, as of an engine whose routers have nothing to do with the trainer's.
REPLAY_LAYOUTS = ("1", "tp=2,pp=2,ep=2", "cp=2", "pp=2,vpp=2,stages=2+1+1+0")
REPLAY_SHAPE = {"qk_nope_head_dim": 24, "v_head_dim": 16}  # cuDNN has attention kernels for multiples of 8
_LAYOUTS_OF = {
    "deepseek_v3": MOE_LAYOUTS, "deepseek_v3_mtp": LAYOUTS, "deepseek_v3_replay": REPLAY_LAYOUTS,
    "qwen2": DENSE_LAYOUTS, "llama": DENSE_LAYOUTS,
}  # fmt: skip
# What every commit is compared at: each axis and each pair of axes that share code, once, in the family that has the
# most of it; the whole matrix takes four times as long.
CORE_LAYOUTS = {
    "deepseek_v3": ("pp=2,stages=1+3", "cp=2", "ep=4,dp=4"),
    "deepseek_v3_mtp": (
        "1", "tp=2,etp=2", "pp=2,vpp=2,stages=2+1+1+0", "cp=2,ep=2", "tp=2,pp=2,ep=2", "tp=2,cp=2,ep=2",
        "pp=2,ep=2,dp=2", "tp=2,ep=2,etp=2,dp=2", "tp=2,cp=2,pp=2,ep=4",
    ),
    "deepseek_v3_replay": ("tp=2,pp=2,ep=2", "cp=2"),
    "qwen2": ("1", "tp=2,cp=2", "cp=2,pp=2", "tp=2,dp=2", "tp=4"),
    "llama": ("1", "tp=2,pp=2", "pp=4", "cp=4", "pp=2,dp=2"),
}  # fmt: skip
Lever = tuple[str, str, dict[str, Any]]  # family, layout, options
CORE_LEVERS: tuple[Lever, ...] = (
    ("deepseek_v3_mtp", "tp=2,pp=2,ep=2", {"recompute": "full", "recompute_num_layers": 1}),
    ("deepseek_v3", "tp=2,ep=2", {"recompute": "selective", "recompute_modules": ("core_attn", "shared_experts")}),
    ("llama", "tp=2,pp=2", {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}),
    ("deepseek_v3_mtp", "tp=2,ep=2", {"logprob_chunk_tokens": 7}),
    # Not of experts: where two of them score alike, rounding picks either, and the outputs differ as they please.
    ("llama", "tp=2", {"params_dtype": "bfloat16"}),
    ("qwen2", "pp=2,dp=2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    # Of Megatron's own code around kernels of DeepEP and apex (see `stand_ins`).
    ("deepseek_v3_mtp", "tp=2,ep=2", {"dispatcher": "flex", "fuse_weight_gradients": True}),
)
LEVERS: tuple[Lever, ...] = (
    *CORE_LEVERS,
    ("deepseek_v3", "tp=2,cp=2", {"recompute": "full", "recompute_num_layers": 2}),
    ("deepseek_v3_mtp", "pp=2,vpp=2", {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}),
    ("qwen2", "tp=2,cp=2", {"recompute": "selective", "recompute_modules": ("core_attn",)}),
    ("deepseek_v3_replay", "tp=2", {"recompute": "full", "recompute_num_layers": 1}),
    ("llama", "pp=2", {"recompute": "full", "recompute_num_layers": 2}),
    ("deepseek_v3", "tp=2,dp=2", {"overlap_grad_reduce": True}),
    ("qwen2", "tp=2,pp=2", {"fuse_weight_gradients": True}),
    ("llama", "cp=2,dp=2", {"fuse_weight_gradients": True, "overlap_grad_reduce": True}),
    ("deepseek_v3", "ep=4,dp=4", {"dispatcher": "flex"}),
    ("deepseek_v3_mtp", "tp=2,etp=2", {"dispatcher": "flex"}),
    ("deepseek_v3_mtp", "tp=2,cp=2,pp=2,ep=4", {"dispatcher": "flex", "recompute": "full", "recompute_num_layers": 1}),
    ("deepseek_v3_replay", "tp=2,pp=2,ep=2", {"dispatcher": "flex"}),
)
# Of Transformer Engine's layers: its attention over context-parallel ranks has kernels for 16 bits alone. DeepSeek's is
# compared with its experts replayed: routers of 16 bits choose others.
TE_LEVERS: tuple[Lever, ...] = (
    ("llama", "cp=2", {"params_dtype": "bfloat16"}),
    ("deepseek_v3_replay", "cp=2", {"params_dtype": "bfloat16"}),
    ("deepseek_v3_replay", "tp=2,cp=2,ep=2", {"params_dtype": "bfloat16"}),
    # Not of qwen2: the gradient of its keys' biases is so small that Adam moves them by what rounding leaves of it.
    ("llama", "tp=2,cp=2", {"params_dtype": "bfloat16"}),
    ("llama", "cp=2,pp=2", {"params_dtype": "bfloat16"}),
    (
        "deepseek_v3",
        "tp=2,ep=2",
        {"recompute": "selective", "recompute_modules": ("mla_up_proj", "layernorm", "moe_act")},
    ),
    ("deepseek_v3_mtp", "tp=2,pp=2,ep=2", {"recompute": "full", "recompute_num_layers": 1}),
    ("qwen2", "pp=2,dp=2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
)
_APEX_KERNEL = "fused_weight_gradient_mlp_cuda"
LEVERS_OF = {"core": CORE_LEVERS, "torch": LEVERS, "te": TE_LEVERS}
HEADER = (
    f"{'family':<16} {'layout':<26} {'log-prob':>9} {'gradient':>9} {'norm':>9} {'weights':>9} {'bias':>7}  "
    "worst gradient"
)


def plan(
    families: Sequence[str],
    layouts: list[str] | None,
    levers: str,
    broken: Sequence[str] = (),
    *,
    core: bool = False,
    layer_spec: str = "torch",
) -> list[dict]:
    """The cells asked for, once for each mistake of `broken` where there are any; `levers` is with, without or only.

    With `core` only those of every commit; the levers are those of the layers. Raises ValueError for a layout that
    cannot be read.
    """
    from r1mega.parallel.layout import Layout

    found = []
    for family in families if levers != "only" else ():
        chosen = layouts or (CORE_LAYOUTS if core else _LAYOUTS_OF)[family]
        found += [{"family": family, "layout": str(Layout.parse(layout)), "options": {}} for layout in chosen]
    if levers == "only" or (levers == "with" and layouts is None):
        found += [
            {"family": family, "layout": str(Layout.parse(layout)), "options": options}
            for family, layout, options in LEVERS_OF["core" if core and layer_spec == "torch" else layer_spec]
            if family in families
        ]
    return [cell | {"broken": name} for name in broken or (None,) for cell in found]


def prepare(work: Path, families: tuple[str, ...]) -> dict[str, Any]:
    """Write the checkpoints of the families and what the reference makes of them; returns what layouts must divide."""
    import torch

    from parity import reference
    from parity.tiny_checkpoints import write_checkpoint
    from r1mega.models import hf_fields

    shapes = {}
    for family in families:
        path = work / family
        shape = REPLAY_SHAPE if family.endswith("_replay") else {}
        name = family.removesuffix("_mtp").removesuffix("_replay")
        write_checkpoint(path, name, mtp=family.endswith("_mtp"), **shape)
        torch.save(reference.answer(path, case_of(path, {"family": family})), work / reference_name({"family": family}))
        shapes[family] = hf_fields.read(path).shape()
    return shapes


def case_of(path: Path, cell: dict) -> Case:
    """The case of a cell: all that a MoE model's loss can hold is in it."""
    config = json.loads((path / "config.json").read_text())
    is_moe = cell["family"].startswith("deepseek")
    case = random_case(
        config["vocab_size"],
        balance_coef=0.05 if is_moe else 0.0,
        bias_update_rate=0.001 if is_moe else 0.0,
        mtp_weight=0.3 if cell["family"].endswith("_mtp") else 0.0,
        updates=5,
    )
    if not cell["family"].endswith("_replay"):
        return case
    choices = random_choices(
        case,
        num_layers=config["num_hidden_layers"] - config["first_k_dense_replace"],
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
    )
    return replace(case, choices=choices)


def reference_name(cell: dict) -> str:
    """The file of the reference's answer."""
    return f"{cell['family']}.pt"


def refusals(cell: dict, shapes: dict[str, Any], layer_spec: str = "torch", device: str = "cpu") -> list[str]:
    """Why the config checks, or the layers, refuse the cell's layout; empty where they do not."""
    from r1mega.parallel.layout import Layout

    layout = Layout.parse(cell["layout"])
    problems = layout.problems(shapes[cell["family"]])
    if layer_spec == "te" and layout.cp > 1 and cell["options"].get("params_dtype") != "bfloat16":
        problems.append("Transformer Engine's attention over context-parallel ranks has no kernels for fp32")
    if device == "cuda" and cell["options"].get("dispatcher") == "flex":
        problems.append("DeepEP's kernels add up bf16 alone; on a CPU something else is in their place")
    if device == "cuda" and "fuse_weight_gradients" in cell["options"] and find_spec(_APEX_KERNEL) is None:
        problems.append(f"apex's {_APEX_KERNEL} is not installed")
    return problems


def is_green(cell: dict) -> bool:
    """Whether all differences of a compared cell are within the tolerances."""
    limits = {
        "max_abs_diff": MAX_LOGPROB_DIFF,
        "max_rel_grad_diff": MAX_GRADIENT_DIFF,
        "max_rel_norm_diff": MAX_NORM_DIFF,
        "max_rel_weight_diff": MAX_WEIGHT_DIFF,
    }
    if cell["options"].get("params_dtype") == "bfloat16":
        limits = BF16_SLACK_OF_EXPERTS if cell["family"].startswith("deepseek") else BF16_SLACK
    return cell["max_bias_diff"] <= MAX_BIAS_DIFF and all(cell[name] <= limit for name, limit in limits.items())


def title(cell: dict) -> str:
    """Family, layout, levers and mistake."""
    return f"{cell['family']:<16} {cell['layout']:<26} {_extras(cell)}".rstrip()


def line(cell: dict) -> str:
    """A compared cell as people read it."""
    numbers = [cell[name] for name in ("max_abs_diff", "max_rel_grad_diff", "max_rel_norm_diff", "max_rel_weight_diff")]
    text = " ".join(f"{number:9.1e}" for number in numbers) + f" {cell['max_bias_diff']:7.0e}"
    verdict = "" if is_green(cell) else "  RED"
    return f"{cell['family']:<16} {cell['layout']:<26} {text}  {cell['worst_tensor']} {_extras(cell)}{verdict}"


def _extras(cell: dict) -> str:
    """The cell's levers and its mistake."""
    extras = cell["options"] | ({"break": cell["broken"]} if cell["broken"] else {})
    return " ".join(f"{name}={value}" for name, value in extras.items())
