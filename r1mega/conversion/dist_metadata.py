"""What makes a folder of boxes a distributed checkpoint: torch.distributed.checkpoint's index, and Megatron's files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from r1mega.config.checkpoint_files import METADATA, MODEL_FOLDER
from r1mega.models.safetensors_file import DTYPES

# What megatron.core.dist_checkpointing reads before it loads (CheckpointingConfig of megatron-core 0.16).
_BACKEND = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


def write(target: Path, boxes: Iterable[dict[str, Any]]) -> None:
    """Write the index of the boxes that workers recorded, and Megatron's files beside it, into target/model."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for box in boxes:
        key, offset = box["key"], torch.Size(box["offset"])
        if key not in tensors:
            properties = TensorProperties(dtype=DTYPES[box["dtype"]])
            tensors[key] = TensorStorageMetadata(properties, torch.Size(box["of"]), [])
        tensors[key].chunks.append(ChunkStorageMetadata(offset, torch.Size(box["shape"])))
        file = Path(box["file"]).relative_to(MODEL_FOLDER)
        places[MetadataIndex(key, offset)] = _StorageInfo(str(file), box["at"], box["nbytes"])
    metadata = Metadata(tensors, planner_data=None, storage_data=places, version=CURRENT_DCP_VERSION)
    folder = target / MODEL_FOLDER
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    torch.save({}, folder / "common.pt")
