"""The model directory that an SGLang 0.5.21 server starts from, beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from r1mega.config.checkpoint_files import TOKENIZER_FILES
from r1mega.models.hf_fields import FP8_CONFIG

# What SGLang's DeepSeek model reads and transformers 5 neither knows nor saves. All four stand in the config.json that
# DeepSeek released, with these values.
_DEEPSEEK_V3 = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1}
_ADDED: dict[str, dict[str, Any]] = {"deepseek_v3": _DEEPSEEK_V3}


def write_engine_config(source: Path, out: Path, *, tokenizer: Path | None = None, fp8: bool = False) -> None:
    """Write config.json for SGLang, and copy the tokenizer and generation defaults, from `source` into `out`.

    The tokenizer may come from a directory of its own. What config.json says of quantised files is left out where
    weights are published in plain numbers; with `fp8` it is what DeepSeek's own says: blocks of 128 x 128.
    No weights: an engine starts without any (`load_format` dummy), or from files that are put beside.
    For a DeepSeek-V3 model it adds, where `source` does not say otherwise:

    - `moe_layer_freq` 1: every layer after the first `first_k_dense_replace` is a mixture of experts. SGLang asks for
      it in each of them, and fails without.
    - `topk_method` noaux_tc: the router chooses with a bias for each expert. SGLang asks for it, and with another value
      would drop the bias in silence.
    - `scoring_func` sigmoid: the router's scores. SGLang asks for it, and knows softmax as well.
    - `ep_size` 1: part of the released file; 0.5.21 does without, and takes the flag of the command line.

    Raises ValueError where `source` has no readable config.json.
    """
    path = source / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the config.json of a model ({error!r}); name a Hugging Face checkpoint"
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    for folder, names in ((source, ["generation_config.json"]), (tokenizer or source, TOKENIZER_FILES)):
        for name in names:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    config.pop("quantization_config", None)
    if fp8:
        config["quantization_config"] = FP8_CONFIG
    text = json.dumps(_ADDED.get(model_type, {}) | config, indent=2) + "\n"
    (out / "config.json").write_text(text, "utf-8")
