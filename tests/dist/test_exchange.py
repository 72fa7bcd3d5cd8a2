"""A publish among the trainer's ranks: every engine rank is handed exactly what it needs, as the checkpoint has it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1mega.models import hf_fields
from r1mega.weights.engine_layout import EngineLayout

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "weights"))
from publish_checks import wanted_by

CASES = [
    ("deepseek_v3", {"mtp": True}, "tp=2,pp=2,ep=2", ["tp=2,ep=2", "1"], "fp32"),
    ("deepseek_v3", {}, "tp=2,dp=2,ep=2,etp=2", ["tp=4,ep=2"], "bf16"),
    ("qwen2", {"tie_word_embeddings": True}, "tp=2,pp=2,vpp=2", ["tp=2"], "fp32"),
    ("llama", {}, "dp=3", ["1", "1", "1", "1"], "bf16"),
]


@pytest.mark.parametrize(("family", "options", "layout", "engines", "dtype"), CASES)
@pytest.mark.parametrize("bucket_bytes", [3_000, 1 << 30])
def test_engine_ranks_get_what_the_checkpoint_has(
    checkpoint, world, family, options, layout, engines, dtype, bucket_bytes
) -> None:
    source = checkpoint(family, num_hidden_layers=4, **options)
    handed = torch.load(
        world("exchange", source, layout, "--engines", *engines, "--publish", dtype, "--bucket-bytes", bucket_bytes)
    )
    fields, tensors = hf_fields.read(source), load_file(source / "model.safetensors")
    places = [(engine, rank) for engine in map(EngineLayout.parse, engines) for rank in range(engine.num_ranks)]
    for receiver, (engine, rank) in enumerate(places):
        found = [(name, tensor) for to, _, name, tensor in handed if to == receiver]
        wanted = wanted_by(fields, engine, rank)
        assert sorted(name for name, _ in found) == sorted(wanted)  # each once
        for name, tensor in found:
            kept = torch.float32 if wanted[name][0].fp32 or dtype == "fp32" else torch.bfloat16
            assert tensor.dtype == kept, name
            assert torch.equal(tensor, tensors[name].to(kept)), name
    assert (len({bucket for _, bucket, _, _ in handed}) > 4) == (bucket_bytes == 3_000)
