"""What a Hugging Face `config.json` says, field by field: honoured, fixed, inert, or refused by name. No torch.

A field that changes the computation and is not honoured here is refused; it is never ignored. `read` gives the fields
of a checkpoint in one spelling, whichever release of transformers wrote them (`rope_scaling` + `rope_theta` of release
4, `rope_parameters` of release 5).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1mega.config import checkpoint_files
from r1mega.parallel.layout import ShapeNumbers

FAMILIES = ("deepseek_v3", "qwen2", "llama")

_BASE = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
    "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
_HONOURED = {
    "deepseek_v3": _BASE
    | {
        "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
        "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group",
        "num_experts_per_tok", "first_k_dense_replace",
    },
    "qwen2": _BASE,
    "llama": _BASE | {"head_dim"},
}  # fmt: skip
# Fields that say nothing about the forward pass: names, generation, training-only values set elsewhere in conf/.
_INERT = {
    "architectures", "model_type", "torch_dtype", "dtype", "use_cache", "transformers_version", "bos_token_id",
    "eos_token_id", "pad_token_id", "_name_or_path", "auto_map", "ep_size", "aux_loss_alpha", "seq_aux",
    "output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "sliding_window", "max_window_layers",
    "_attn_implementation_autoset", "tokenizer_class", "decoder_start_token_id", "_experts_implementation",
    # Multi-token prediction adds layers after the model, which its own forward pass does not use. transformers writes 1
    # even where there are none: the tensors say (see `read`).
    "num_nextn_predict_layers", "num_mtp_layers",
}  # fmt: skip
# Fields honoured at one value only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),  # Qwen2.5-Math writes it
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "norm_topk_prob": (True,),
    "rope_interleave": (True,),
    "quantization_config": (None,),
}
_REMEDY = {
    "quantization_config": "convert it: python tools/convert_checkpoint.py hf-to-hf --hf DIR --out DIR --dtype bf16"
}
# The kinds of numbers that other fields and shapes are reckoned from.
_COUNTS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "moe_intermediate_size", "n_routed_experts", "kv_lora_rank", "q_lora_rank",
    "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "n_group", "topk_group", "num_experts_per_tok",
}  # fmt: skip
_COUNTS_OR_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}
_NUMBERS = {"rms_norm_eps", "initializer_range", "routed_scaling_factor", "rope_theta"}
_MAX_COUNT = {"num_hidden_layers": 10_000, "n_routed_experts": 10_000}  # beyond, the table alone would fill the memory
# What DeepSeek's FP8 checkpoints say of themselves; how activations are quantised is the engine's affair.
FP8_CONFIG = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
_ROPE_KEYS = {
    "default": set(),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"},
}
_ROPE_TYPES = {"deepseek_v3": ("default", "yarn"), "qwen2": ("default",), "llama": ("default", "llama3")}


@dataclass(frozen=True)
class HfFields:
    """A validated config.json. `values` has one spelling of each field; `rope` has at least `rope_type`,
    `rope_theta`."""

    path: Path
    family: str
    values: dict[str, Any]
    rope: dict[str, Any]
    num_mtp_layers: int = 0
    """Multi-token-prediction layers: 0 or 1."""
    is_fp8: bool = False
    """Whether the checkpoint holds the weights of its linear layers in FP8 blocks."""
    has_score: bool = False
    """A reward model: a row `score.weight` stands in the place of the output table."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def head_dim(self) -> int:
        """Width of one attention head of qwen2 and llama."""
        return self.values.get("head_dim") or self["hidden_size"] // self["num_attention_heads"]

    @property
    def dtype(self) -> str:
        """The dtype the checkpoint was written in, by torch's name, e.g. "bfloat16"."""
        return self.values.get("dtype") or self.values.get("torch_dtype") or "float32"

    @property
    def is_moe(self) -> bool:
        return self.family == "deepseek_v3"

    @property
    def moe_layers(self) -> range:
        """The decoder layers that have experts; empty for a dense model."""
        last = self["num_hidden_layers"]
        return range(self["first_k_dense_replace"] if self.is_moe else last, last)

    def as_reward_model(self) -> HfFields:
        """The same model with a score in the place of logits, and without a layer that predicts further."""
        return replace(self, has_score=True, num_mtp_layers=0)

    def shape(self) -> ShapeNumbers:
        """What a parallel layout has to divide."""
        v = self.values
        moe = self.is_moe
        return ShapeNumbers(
            num_layers=v["num_hidden_layers"],
            num_heads=v["num_attention_heads"],
            num_kv_heads=v["num_attention_heads"] if moe else v["num_key_value_heads"],
            ffn_hidden_size=v["intermediate_size"],
            num_experts=v["n_routed_experts"] if moe else 0,
            moe_ffn_hidden_size=v["moe_intermediate_size"] if moe else 0,
            shared_ffn_hidden_size=v["moe_intermediate_size"] * v["n_shared_experts"] if moe else 0,
        )


def read(checkpoint_dir: str | Path, *, drop_mtp: bool = False, allow_fp8: bool = False) -> HfFields:
    """Read and validate CHECKPOINT_DIR/config.json. With `drop_mtp` the model ends before its extra prediction layer.

    A checkpoint in FP8 blocks is refused unless `allow_fp8`: it is converted, not trained.

    Raises:
        ValueError: all that is wrong with it in one message: unreadable, an unknown family, a missing field, a field or
            value that is not honoured.
    """
    path = Path(checkpoint_dir) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; must be a Hugging Face checkpoint's config.json; restore it, or name another folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); restore the file from its source") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; must be readable; mend the path or its permissions") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a JSON {type(raw).__name__}; must be an object; restore the file from its source")
    fields = parse(raw, path, allow_fp8=allow_fp8)
    return fields if drop_mtp else replace(fields, num_mtp_layers=_num_mtp_layers(fields))


def _num_mtp_layers(fields: HfFields) -> int:
    """1 where the checkpoint holds the tensors of a layer after the last, or asks for one and has no weights yet."""
    if fields.family != "deepseek_v3":
        return 0
    folder, layer = fields.path.parent, fields["num_hidden_layers"]
    if checkpoint_files.is_megatron(folder) or not any(folder.glob("*.safetensors")):
        count = fields.values.get("num_nextn_predict_layers", 0)
    else:
        # Damaged files are reported by the checks of the checkpoint, not here.
        names = checkpoint_files.tensor_names(folder)
        count = len({layer_of(name) for name in names if layer_of(name) >= layer})
    if count > 1:
        raise ValueError(
            f"{fields.path}: num_nextn_predict_layers: got {count}; at most one such layer is honoured; "
            "remove the others from a copy of the checkpoint"
        )
    return count


def honoured(family: str) -> frozenset[str]:
    """The fields of a family's config.json that decide what is computed."""
    return frozenset(_HONOURED[family])


def layer_of(name: str) -> int:
    """The layer a tensor's name speaks of; -1 for none."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdigit() else -1


def parse(raw: dict[str, Any], path: Path = Path("config.json"), *, allow_fp8: bool = False) -> HfFields:
    """Validate the fields of a config.json that was already read. Raises ValueError (see `read`)."""
    family = raw.get("model_type")
    quantization = raw.get("quantization_config")
    is_fp8 = allow_fp8 and quantization is not None
    if is_fp8:
        raw = {name: value for name, value in raw.items() if name != "quantization_config"}
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type: got {family!r}; must be one of {', '.join(FAMILIES)}; no other family is built"
        )
    values = {
        "num_key_value_heads": raw.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    if family == "deepseek_v3":
        values |= {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    values |= {name: value for name, value in raw.items() if value is not None or name == "q_lora_rank"}
    found = _kind_problems(values)
    if found:
        raise ValueError("\n".join(f"{path}: {problem}; restore the file from its source" for problem in found))
    rope, found = _rope(raw, family)
    found += _field_problems(raw, values, family)
    found += _fp8_problems(quantization) if is_fp8 else []
    if _is_classifier(raw) and len(raw.get("id2label") or (0, 1)) != 1:  # transformers takes two where it is absent
        found.append("id2label: got a classifier of several labels; a reward model has one; train one from a base")
    if not found and family == "deepseek_v3":
        found += _router_problems(values)
    if found:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in found))
    return HfFields(path, family, values, rope, is_fp8=is_fp8, has_score=_is_classifier(raw))


def _kind_problems(values: dict[str, Any]) -> list[str]:
    """Fields whose value is not of the kind that the others are reckoned from."""
    found = []
    for name, value in values.items():
        if value is None:
            continue  # absent; what is missing is told elsewhere
        if name in _COUNTS | _COUNTS_OR_ZERO:
            least, most = int(name in _COUNTS), _MAX_COUNT.get(name, 1 << 31)
            if type(value) is not int or not least <= value <= most:
                found.append(f"{name}: got {value!r}; must be a whole number from {least} to {most}")
        elif name in _NUMBERS and not _is_number(value):
            found.append(f"{name}: got {value!r}; must be a number not below 0")
        elif name == "tie_word_embeddings" and not isinstance(value, bool):
            found.append(f"{name}: got {value!r}; must be true or false")
        elif name in ("rope_scaling", "rope_parameters"):
            if not isinstance(value, dict):
                found.append(f"{name}: got {value!r}; must be an object")
            elif not _is_number(value.get("rope_theta", 1)):
                found.append(f"{name}.rope_theta: got {value['rope_theta']!r}; must be a number not below 0")
    return found


def _is_classifier(raw: dict[str, Any]) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or ())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _field_problems(raw: dict[str, Any], values: dict[str, Any], family: str) -> list[str]:
    honoured = _HONOURED[family]
    found = [
        f"{name}: missing; {family} needs it"
        for name in sorted(honoured - {"rope_theta", "rope_scaling", "rope_parameters", "head_dim"})
        if name not in values
    ]
    for name, value in raw.items():
        if name in honoured or name in _INERT:
            continue
        if name in _FIXED:
            if value not in _FIXED[name]:
                remedy = _REMEDY.get(name, f"only a model with {name}={_FIXED[name][0]!r} can be trained")
                found.append(f"{name}: got {value!r}; honoured only at {_FIXED[name][0]!r}; {remedy}")
        elif name == "layer_types":
            kinds = value if isinstance(value, list) else [value]
            if any(kind not in ("full_attention", None) for kind in kinds):
                found.append(f"layer_types: got {sorted(set(map(str, kinds)))}; only full_attention is honoured")
        elif name == "head_dim" and family == "qwen2":
            expected = raw["hidden_size"] // raw["num_attention_heads"]
            if value != expected:
                found.append(f"head_dim: got {value}; honoured only at hidden_size / num_attention_heads = {expected}")
        elif name in ("head_dim", "qk_head_dim") and family == "deepseek_v3":
            # Derived numbers that transformers writes beside the ones they come from.
            nope, rope = raw.get("qk_nope_head_dim"), raw.get("qk_rope_head_dim")
            if nope is not None and rope is not None and value not in (rope, nope + rope):
                found.append(
                    f"{name}: got {value}; must follow from qk_nope_head_dim={nope} and qk_rope_head_dim={rope}"
                )
        else:
            found.append(
                f"{name}: got {value!r}; this field is not honoured for {family}; "
                "remove it from a copy of config.json if it does not change the model"
            )
    return found


def _fp8_problems(quantization: Any) -> list[str]:
    got = quantization if isinstance(quantization, dict) else {}
    return [
        f"quantization_config.{name}: got {got.get(name)!r}; must be {value!r}; take the checkpoint in bf16 instead"
        for name, value in FP8_CONFIG.items()
        if name != "activation_scheme" and got.get(name) != value
    ]


def _router_problems(v: dict[str, Any]) -> list[str]:
    found = []
    experts, groups, kept, top_k = v["n_routed_experts"], v["n_group"], v["topk_group"], v["num_experts_per_tok"]
    if experts % groups or kept > groups:
        found.append(f"n_group: got {groups} with topk_group={kept}; n_group must divide n_routed_experts={experts}")
    elif groups > 1 and (top_k % kept or top_k // kept != 2):
        # Megatron scores a group by its best top_k / topk_group experts, DeepSeek by its best two: alike only at two.
        found.append(
            f"num_experts_per_tok: got {top_k} with topk_group={kept}; group-limited routing is honoured only where "
            "num_experts_per_tok = 2 x topk_group"
        )
    if v["first_k_dense_replace"] > v["num_hidden_layers"]:
        found.append(f"first_k_dense_replace: got {v['first_k_dense_replace']}; must not exceed num_hidden_layers")
    return found


def _rope(raw: dict[str, Any], family: str) -> tuple[dict[str, Any], list[str]]:
    """The rope settings in one spelling, and what is wrong with them."""
    rope = dict(raw.get("rope_parameters") or {})
    scaling = dict(raw.get("rope_scaling") or {})
    rope = scaling | rope
    legacy_type = rope.pop("type", None)
    rope.setdefault("rope_type", legacy_type or "default")
    if "rope_theta" not in rope:
        rope["rope_theta"] = raw.get("rope_theta", 10000.0)
    kind = rope["rope_type"]
    if kind not in _ROPE_TYPES[family]:
        return rope, [f"rope_scaling: got type {kind!r}; honoured for {family}: {', '.join(_ROPE_TYPES[family])}"]
    if kind == "yarn":
        rope = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0, **rope}
    found = []
    for name in sorted(set(rope) - _ROPE_KEYS[kind] - {"rope_type", "rope_theta"}):
        if not (name == "partial_rotary_factor" and rope[name] == 1.0):
            found.append(f"rope_scaling.{name}: got {rope[name]!r}; this field is not honoured for rope type {kind!r}")
    found += [
        f"rope_scaling.{name}: missing; rope type {kind!r} needs it" for name in sorted(_ROPE_KEYS[kind] - set(rope))
    ]
    return rope, found
