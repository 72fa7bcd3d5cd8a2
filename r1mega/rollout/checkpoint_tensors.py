"""The tensors of a Hugging Face checkpoint as an engine loads them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from r1mega.config.checkpoint_files import INDEX, SINGLE, read_json_object
from r1mega.types import NamedTensors


def checkpoint_stream(directory: Path) -> NamedTensors:
    """(name, tensor) of a checkpoint directory, one file after the other.

    Where the embeddings are tied, a head that some writers store besides is left out. Raises ValueError where a file is
    missing or damaged.
    """
    tied = json.loads((directory / "config.json").read_text("utf-8")).get("tie_word_embeddings", False)
    files = [SINGLE]
    if (directory / INDEX).exists():
        files = sorted(set(read_json_object(directory / INDEX)["weight_map"].values()))
    for name in files:
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dictionary)
                    if not (tied and key == "lm_head.weight"):
                        yield key, file.get_tensor(key)
        except OSError as error:
            raise ValueError(f"{directory / name}: {error}; restore the checkpoint") from error
