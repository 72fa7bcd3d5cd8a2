"""A publish among the trainer's ranks: every engine rank is handed exactly what it needs, as the checkpoint has it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1mega.conversion.run import Request, convert
from r1mega.models import hf_fields
from r1mega.models.fp8_blocks import SCALE_SUFFIX
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


@pytest.mark.parametrize(("layout", "held"), [("tp=2,pp=2,ep=2", "bfloat16"), ("tp=2,dp=2,ep=2,etp=2", "float32")])
def test_fp8_blocks_are_the_converters(checkpoint, world, tmp_path, in_process, layout, held) -> None:
    """Whole blocks, whatever cut runs through them, with their scales; the rest in bf16."""
    wide = {"hidden_size": 192, "intermediate_size": 288, "moe_intermediate_size": 144}
    source = checkpoint("deepseek_v3", num_hidden_layers=4, dtype=held, **wide)
    convert(Request(source=source, source_kind="hf", out=tmp_path / "fp8", to="hf", dtype="fp8"))
    published = load_file(tmp_path / "fp8" / "model.safetensors")
    engine = EngineLayout(tp=2, ep=2)
    options = ("--dtype", held, "--engines", str(engine), "--publish", "fp8", "--bucket-bytes", 500_000)
    handed = torch.load(world("exchange", source, layout, *options))
    fields = hf_fields.read(source)
    for rank in range(2):
        found = {name: tensor for to, _, name, tensor in handed if to == rank}
        wanted = wanted_by(fields, engine, rank)
        scales = [name + SCALE_SUFFIX for name in wanted if name + SCALE_SUFFIX in published]
        assert sorted(found) == sorted([*wanted, *scales]) and scales
        for name, tensor in found.items():
            expected = published[name]
            if name.endswith("e_score_correction_bias"):
                expected = expected.float()
            elif name + SCALE_SUFFIX in published:
                expected = expected.view(torch.uint8)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
