"""A checkpoint that all ranks write at once: what the trainer holds, in FP8 what the converter makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1mega.conversion.run import Request, convert
from r1mega.models import fp8_blocks, hf_fields
from r1mega.models.fp8_blocks import SCALE_SUFFIX
from r1mega.models.hf_io import CheckpointReader
from r1mega.parallel.layout import Layout
from r1mega.weights.checksums import ExpectedChecksums
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, engine_params

# Blocks that two and three tensor ranks cut, and that a matrix ends in.
WIDE = {"hidden_size": 192, "intermediate_size": 288, "moe_intermediate_size": 144}
TIED = {"hidden_size": 192, "intermediate_size": 288, "tie_word_embeddings": True}
CASES = [
    ("deepseek_v3", {"mtp": True, **WIDE}, "tp=2,pp=2,ep=2", "tp=2,ep=2", "float32", "fp32"),
    ("deepseek_v3", {"mtp": True, **WIDE}, "tp=2,dp=2,ep=2,etp=2", "1", "float32", "fp8"),
    ("deepseek_v3", {"dtype": "bfloat16", **WIDE}, "tp=2,pp=2,ep=2", "tp=2,ep=2", "bfloat16", "fp8"),
    ("qwen2", {"dtype": "bfloat16", **TIED}, "tp=2,pp=2,vpp=2", "tp=2", "bfloat16", "fp8"),
    ("llama", {}, "dp=3", "tp=2", "float32", "bf16"),
]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the files that the index, or the one file there is, names."""
    reader = CheckpointReader(path)
    found = {name: tensor for file in set(reader.where.values()) for name, tensor in load_file(path / file).items()}
    assert found.keys() == reader.where.keys()
    return found


def wanted_of(source: Path, publish: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The source's tensors as they have to be published."""
    if publish != "fp8":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[publish]
        return {name: tensor.to(dtype) for name, tensor in tensors_of(source).items()}
    convert(Request(source=source, source_kind="hf", out=tmp_path / "fp8", to="hf", dtype="fp8"))
    return tensors_of(tmp_path / "fp8")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("e_score_correction_bias"):
            # Megatron keeps gate biases in fp32, as DeepSeek publishes them; these small checkpoints may not.
            assert found[name].dtype == torch.float32 and torch.equal(found[name].to(tensor.dtype), tensor), name
            continue
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(("family", "options", "layout", "engine", "held", "publish"), CASES)
def test_all_ranks_write_what_the_checkpoint_has(
    checkpoint, world, tmp_path, in_process, family, options, layout, engine, held, publish
) -> None:
    source = checkpoint(family, num_hidden_layers=4, **options)
    options = ("--engines", engine, "--dtype", held, "--publish", publish, "--bucket-bytes", 60_000)
    out = world("spread", source, layout, *options)
    wanted, published = wanted_of(source, publish, tmp_path), tensors_of(out)
    assert_same(published, wanted)
    assert (out / "config.json").read_text() == (source / "config.json").read_text()
    found = torch.load(out / "found")
    assert found["turns"] > 2 and len(list(out.glob("*.safetensors"))) > 2
    check_digests(found["digests"], source, EngineLayout.parse(engine), published, publish)
    # A full disk: all ranks hear the same of the one that met it; what was there before stays, what failed does not.
    (heard,) = set(found["heard"])
    assert "No space left on device" in heard and heard.endswith("that all ranks and servers see")
    assert f"rank {Layout.parse(layout).world_size - 1} writes " in heard
    assert heard.count("\n") == 0 and str(out.with_name("other.part")) in heard
    assert not out.with_name("other").exists()


def check_digests(digests, source: Path, engine: EngineLayout, published, publish: str) -> None:
    """Hashed by many, each parameter as one rank alone would hash what stands in the files."""
    fields = hf_fields.read(source)
    for rank in range(engine.num_ranks):
        params = engine_params(fields, engine, rank, EngineBuild(device="cpu"))
        expected = ExpectedChecksums(params, dtype=torch.float32 if publish == "fp32" else torch.bfloat16, device="cpu")
        for name, tensor in published.items():
            if name + SCALE_SUFFIX in published:
                tensor = fp8_blocks.dequantize(tensor, published[name + SCALE_SUFFIX])
            expected.add(name, tensor)
        assert digests[rank] == expected.result()


def test_blocks_of_the_parts_are_other_blocks(checkpoint, tmp_path, in_process) -> None:
    """What a rank would make of its part alone, where a cut runs through a block."""
    source = checkpoint("qwen2", dtype="bfloat16", num_hidden_layers=4, **TIED)
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = wanted_of(source, "fp8", tmp_path)
    parts = [fp8_blocks.quantize(part.contiguous())[0] for part in tensors_of(source)[name].chunk(2, dim=1)]
    whole = fp8_blocks.quantize(tensors_of(source)[name])[0]
    assert torch.equal(whole.view(torch.uint8), wanted[name].view(torch.uint8))
    assert not torch.equal(torch.cat([part.view(torch.uint8) for part in parts], 1), wanted[name].view(torch.uint8))


def test_a_copy_for_recovery_is_of_the_moment_it_was_taken(checkpoint, world) -> None:
    source = checkpoint("llama")
    out = world("recovery", source, "tp=2", "--publish", "fp32", "--bucket-bytes", 20_000)
    assert sorted(path.name for path in out.iterdir()) == ["newest", "version-000004", "version-000005"]
    assert sorted(path.suffix for path in (out / "newest").glob("written*")) == []
    for version in ("version-000004", "newest"):
        assert_same(tensors_of(out / version), wanted_of(source, "fp32", out))
