"""The files beside the weights: config.json with the edits asked for, the tokenizer, the generation defaults."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config.checkpoint_files import TOKENIZER_FILES
from r1mega.models.hf_fields import FP8_CONFIG, HfFields
from r1mega.models.hf_score import classifier_changes

# Fields of config.json that may be set: what a student gets when it is prepared for distillation. Others would make it
# another model than its weights are of.
_EDITABLE = {
    "max_position_embeddings": int, "rope_theta": float, "tie_word_embeddings": bool, "bos_token_id": int,
    "eos_token_id": int, "pad_token_id": int,
}  # fmt: skip
_DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16"}  # FP8 weights compute in bf16: what DeepSeek's own config.json says


@dataclass(frozen=True)
class Edit:
    """One field of config.json that the target has otherwise than the source. None: absent."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"config.json: {self.name}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def parse_edits(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts -> values. Raises ValueError for a field that may not be set or a value of another kind."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in _EDITABLE:
            allowed = ", ".join(_EDITABLE)
            raise ValueError(
                f"--set {text}: got {name!r}; must be one of {allowed}; other fields follow from the weights"
            )
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        kind = _EDITABLE[name]
        is_bool = isinstance(parsed, bool)
        least = 1 if name in ("max_position_embeddings", "rope_theta") else 0
        is_number = isinstance(parsed, kind | int) and not is_bool and least <= parsed < math.inf
        if not (is_bool if kind is bool else is_number):
            must = "true or false" if kind is bool else f"a finite {kind.__name__} in JSON, {least} or more"
            raise ValueError(f"--set {text}: got {value!r}; must be {must}")
        found[name] = parsed
    return found


def edited(
    source: HfFields, raw: dict[str, Any], dtype: str | None, changes: dict[str, Any]
) -> tuple[dict[str, Any], list[Edit]]:
    """(the target's config.json, what differs from the source's).

    Raises ValueError where tied tables are asked for of a checkpoint that has two.
    """
    if changes.get("tie_word_embeddings") and not source["tie_word_embeddings"]:
        raise ValueError(
            "--set tie_word_embeddings=true: the checkpoint has its own output table, which would be lost; leave it so"
        )
    new = dict(raw)
    for name, value in changes.items():
        if name == "rope_theta" and isinstance(raw.get("rope_parameters"), dict):
            new["rope_parameters"] = raw["rope_parameters"] | {"rope_theta": value}
            if name not in raw:
                continue
        new[name] = value
    if dtype is not None:
        new[next((name for name in ("dtype", "torch_dtype") if name in raw), "torch_dtype")] = _DTYPES[dtype]
    if dtype == "fp8":
        new.setdefault("quantization_config", dict(FP8_CONFIG))
    else:
        new.pop("quantization_config", None)
    if source.family == "deepseek_v3" and source.num_mtp_layers != raw.get("num_nextn_predict_layers", 0):
        new["num_nextn_predict_layers"] = source.num_mtp_layers
    names = [name for name in (*raw, *(name for name in new if name not in raw))]
    return new, [Edit(name, raw.get(name), new.get(name)) for name in names if raw.get(name) != new.get(name)]


def write(target: Path, source: Path, tokenizer: Path, config: dict[str, Any]) -> list[str]:
    """Write config.json and copy the tokenizer's and the other files; returns the names copied."""
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copied = []
    for folder, names in ((source, ["generation_config.json", *_code(source)]), (tokenizer, TOKENIZER_FILES)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
                copied.append(name)
    return copied


def keep(target: Path, fields: HfFields, tokenizer: Path) -> None:
    """Put the model's config.json, true to the layers it has, and the tokenizer's files beside its weights."""
    raw = json.loads(fields.path.read_text(encoding="utf-8"))
    if fields.num_mtp_layers != raw.get("num_nextn_predict_layers", 0):
        raw["num_nextn_predict_layers"] = fields.num_mtp_layers
    if fields.has_score:
        raw |= classifier_changes(fields.family)
    write(target, fields.path.parent, tokenizer, raw)


def check_tokenizer(tokenizer: Path, fields: HfFields, *, must_be: bool = False) -> None:
    """Raise ValueError where the tokenizer has ids that the model's tables do not, or `must_be` and is not."""
    if must_be and not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"--tokenizer {tokenizer}: holds no tokenizer; must hold one of {', '.join(TOKENIZER_FILES)}; name another"
        )
    path = tokenizer / "tokenizer.json"
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
        if type(largest) is not int:
            raise TypeError(f"an id is {largest!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a tokenizer ({error!r}); restore it, or name another with --tokenizer") from None
    if largest >= fields["vocab_size"]:
        raise ValueError(
            f"{path}: its largest id is {largest}; must be below the model's vocab_size {fields['vocab_size']}; "
            "name the model's own tokenizer with --tokenizer"
        )


def _code(source: Path) -> list[str]:
    """Code that a config.json may name in `auto_map`."""
    return sorted(path.name for path in source.glob("*.py"))
