"""How a reward model says in its config.json that it is one: transformers' *ForSequenceClassification of one label."""

from __future__ import annotations

from typing import Any

_CLASSES = {"deepseek_v3": "DeepseekV3", "qwen2": "Qwen2", "llama": "Llama"}


def classifier_changes(family: str) -> dict[str, Any]:
    """Fields of config.json that differ from those of a language model of the family."""
    changes: dict[str, Any] = {
        "architectures": [f"{_CLASSES[family]}ForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    }
    return changes | ({"num_nextn_predict_layers": 0} if family == "deepseek_v3" else {})
