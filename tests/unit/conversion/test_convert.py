"""There and back without a bit changed, for every family and between FP8 and bf16; files, edits and the record."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from r1mega.conversion.run import ConversionError
from r1mega.models import fp8_blocks

from .inline import Inline, assert_same, changed, differing, files, weights, with_arbitrary_scales
from .inline import with_fp32_gates as fp32_gates

MTP = {"dtype": "bfloat16", "mtp": True}
# Several blocks of 128 x 128 in both directions, and edges that end within one.
WIDE = MTP | {
    "hidden_size": 136, "intermediate_size": 264, "moe_intermediate_size": 140, "num_hidden_layers": 2,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "deepseek_v3": ("deepseek_v3", {"dtype": "bfloat16"}),
    "deepseek_v3-mtp": ("deepseek_v3", MTP),
    "deepseek_v3-mtp-tied": ("deepseek_v3", MTP | {"tie_word_embeddings": True}),
    "deepseek_v3-fp32": ("deepseek_v3", {"dtype": "float32", "q_lora_rank": None}),
    "qwen2": ("qwen2", {"dtype": "bfloat16"}),
    "qwen2-tied": ("qwen2", {"dtype": "bfloat16", "tie_word_embeddings": True}),
    "llama": ("llama", {"dtype": "bfloat16", "num_key_value_heads": 1}),
    "llama-fp16": ("llama", {"dtype": "float16"}),
}


@pytest.fixture
def inline(monkeypatch):
    return Inline(monkeypatch)


@pytest.fixture(scope="session")
def wide(checkpoint, tmp_path_factory):
    """DeepSeek-V3 with MTP and fp32 gate biases, in bf16."""
    return changed(checkpoint("deepseek_v3", **WIDE), tmp_path_factory.mktemp("wide") / "bf16", fp32_gates)


@pytest.fixture(scope="session")
def published(wide, tmp_path_factory):
    """The same in FP8 with scales that are nobody's largest / 448."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        Inline(patch)("hf-to-hf", wide, folder / "made", dtype="fp8")
    return changed(folder / "made", folder / "hf", with_arbitrary_scales)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_same_to_the_bit(checkpoint, inline, tmp_path, name):
    family, options = FAMILIES[name]
    source = changed(checkpoint(family, **options), tmp_path / "source", fp32_gates)
    inline("hf-to-megatron", source, tmp_path / "megatron")
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert_same(ours, theirs)
    dtypes = {bias: ours[bias].dtype for bias in ours if bias.endswith("e_score_correction_bias")}
    assert set(dtypes.values()) <= {torch.float32}
    assert bool(dtypes) == (family == "deepseek_v3")
    assert any(".layers.4." in found for found in ours) == ("mtp" in name)
    raw = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == raw
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    # Once more to Megatron: the same distributed checkpoint, byte for byte.
    inline("hf-to-megatron", tmp_path / "back", tmp_path / "again")
    first, again = files(tmp_path / "megatron"), files(tmp_path / "again")
    assert first.keys() == again.keys()
    assert {file for file in first if first[file] != again[file]} == {"conversion.json"}  # which names the source


def test_one_bit_changed_in_between_is_seen(checkpoint, inline, tmp_path):
    """Negative control of the round trip."""
    source = checkpoint("llama", dtype="bfloat16")
    inline("hf-to-megatron", source, tmp_path / "megatron")
    record = json.loads((tmp_path / "megatron" / "conversion.json").read_text())["targets"][0]
    path = tmp_path / "megatron" / record["file"]
    content = bytearray(path.read_bytes())
    raw = weights(source)["model.embed_tokens.weight"].contiguous().view(torch.uint8).numpy().tobytes()
    content[content.index(raw) + 5] ^= 1
    path.write_bytes(content)
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert {name: differing(ours[name], theirs[name]) for name in theirs if differing(ours[name], theirs[name])} == {
        "model.embed_tokens.weight": 1
    }


@pytest.mark.parametrize("between", ["hf", "megatron"])
def test_fp8_blocks_come_back_with_their_scales(inline, published, tmp_path, between):
    """FP8 -> bf16 -> FP8, and FP8 -> Megatron -> FP8: values and scales, although bf16 cannot hold such scales."""
    if between == "hf":
        inline("hf-to-hf", published, tmp_path / "between", dtype="bf16")
        plain = weights(tmp_path / "between")
        source = weights(published)
        assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16, torch.float32}
        assert not [name for name in plain if name.endswith("_scale_inv")]
        for name, scale in source.items():
            if name.endswith("_scale_inv"):
                expected = fp8_blocks.dequantize(source[name.removesuffix("_scale_inv")], scale)
                assert differing(plain[name.removesuffix("_scale_inv")], expected) == 0
            elif name + "_scale_inv" not in source:
                assert differing(plain[name], source[name]) == 0
    else:
        inline("hf-to-megatron", published, tmp_path / "between")
    assert "quantization_config" not in json.loads((tmp_path / "between" / "config.json").read_text())
    inline(f"{between}-to-hf", tmp_path / "between", tmp_path / "back", dtype="fp8")
    assert_same(weights(tmp_path / "back"), weights(published))
    raw = json.loads((published / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == raw


@pytest.mark.parametrize("between", ["hf", "megatron"])
def test_scales_of_a_blocks_own_largest_need_no_help(inline, wide, published, tmp_path, between):
    """Without the file of former scales: those that were largest / 448 come back, arbitrary ones do not."""
    inline("hf-to-hf", wide, tmp_path / "made", dtype="fp8")
    for source, comes_back in ((tmp_path / "made", True), (published, False)):
        folder = tmp_path / f"of-{source.name}"
        options = {"dtype": "bf16"} if between == "hf" else {}
        inline(f"hf-to-{between}", source, folder / "between", **options)
        (folder / "between" / "fp8_scales.safetensors").unlink()
        inline(f"{between}-to-hf", folder / "between", folder / "back", dtype="fp8")
        ours, theirs = weights(folder / "back"), weights(source)
        assert ours.keys() == theirs.keys()
        assert all(differing(ours[name], theirs[name]) == 0 for name in theirs) == comes_back


@pytest.mark.parametrize("between", ["hf", "megatron"])
@pytest.mark.parametrize("change", ["shape", "name", "dtype"])
def test_former_scales_of_another_model_are_refused(inline, published, tmp_path, between, change):
    options = {"dtype": "bf16"} if between == "hf" else {}
    inline(f"hf-to-{between}", published, tmp_path / "between", **options)
    path = tmp_path / "between" / "fp8_scales.safetensors"
    scales, name = load_file(path), "model.layers.1.self_attn.o_proj.weight_scale_inv"
    scale = scales.pop(name)
    scales |= {
        "shape": {name: scale[:1]},
        "name": {"model.layers.9.self_attn.o_proj.weight_scale_inv": scale},
        "dtype": {name: scale.bfloat16()},
    }[change]
    save_file(scales, path)
    with pytest.raises(ValueError, match=r"fp8_scales\.safetensors: model\.layers\.[19]\.self_attn\.o_proj.*: got "):
        inline(f"{between}-to-hf", tmp_path / "between", tmp_path / "back", dtype="fp8")


def test_a_quantised_checkpoint_is_as_deepseek_publishes_it(inline, wide, tmp_path):
    outcome = inline("hf-to-hf", wide, tmp_path / "fp8", dtype="fp8")
    made, source = weights(tmp_path / "fp8"), weights(wide)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert [edit.name for edit in outcome.edits] == ["quantization_config"]
    kept = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "eh_proj.weight", "head.weight")
    for name, tensor in source.items():
        if name.endswith((*kept, "e_score_correction_bias")):
            assert differing(made.pop(name), tensor) == 0
            continue
        values, scale = fp8_blocks.quantize(tensor)
        assert differing(made.pop(name), values) == 0, name
        assert differing(made.pop(name + "_scale_inv"), scale) == 0, name
    assert made == {}


@pytest.mark.parametrize("command", ["hf-to-hf", "hf-to-megatron"])
def test_the_number_of_workers_changes_no_byte(inline, published, tmp_path, command):
    inline.limits(part=200_000, file=1_000_000)
    options = {"dtype": "bf16"} if command == "hf-to-hf" else {}
    counts = []
    for workers in (1, 3):
        inline.die_after(None)
        outcome = inline(command, published, tmp_path / str(workers), workers=workers, **options)
        assert sorted(inline.made) == list(range(outcome.parts))
        counts.append(outcome.parts)
    assert inline.workers == [1, 3]
    assert counts[0] == counts[1] > 4
    assert files(tmp_path / "1") == files(tmp_path / "3")


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_several_files_and_their_index(inline, wide, tmp_path, dtype):
    inline("hf-to-hf", wide, tmp_path / "one", dtype=dtype)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    inline.limits(part=150_000, file=300_000)
    inline("hf-to-hf", wide, tmp_path / "many", dtype=dtype)
    whole = weights(tmp_path / "one")
    assert_same(weights(tmp_path / "many"), whole)  # which also checks the index against the files
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 3
    for name in names:
        held = load_file(tmp_path / "many" / name).values()
        size = sum(tensor.nbytes for tensor in held)
        assert size <= 300_000 or len(held) <= 4  # a tensor, its scales and what repeats it are never parted
    # Several files as the source.
    inline("hf-to-megatron", tmp_path / "many", tmp_path / "megatron")
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", dtype=dtype)
    assert_same(weights(tmp_path / "back"), whole)


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def test_the_record_has_every_tensor_once(inline, published, tmp_path):
    """Every source with the digest of its bytes, every target with what it was made of."""
    inline.limits(part=100_000)
    inline("hf-to-hf", published, tmp_path / "bf16", dtype="bf16")
    record = json.loads((tmp_path / "bf16" / "conversion.json").read_text())
    source, made = weights(published), weights(tmp_path / "bf16")
    assert {name: entry["xxh3_128"] for name, entry in record["sources"].items()} == {
        name: digest(tensor) for name, tensor in source.items()
    }
    assert {name: tuple(entry["shape"]) for name, entry in record["sources"].items()} == {
        name: tuple(tensor.shape) for name, tensor in source.items()
    }
    targets = {entry["name"]: entry for entry in record["targets"]}
    assert len(targets) == len(record["targets"])
    scales = {name for name in source if name.endswith("_scale_inv")}
    assert targets.keys() == made.keys() | scales
    for name, entry in targets.items():
        stored = made[name] if name in made else source[name]
        assert (entry["xxh3_128"], tuple(entry["shape"])) == (digest(stored), tuple(stored.shape)), name
        raw = (tmp_path / "bf16" / entry["file"]).read_bytes()[entry["at"] :][: entry["nbytes"]]
        assert xxhash.xxh3_128_hexdigest(raw) == entry["xxh3_128"]
        whole = name.removesuffix("_scale_inv")
        assert {whole, whole + "_scale_inv"} & source.keys() <= set(entry["from"])
    # Without the targets that repeat another one, every source is used once.
    first = [entry for entry in record["targets"] if entry["name"] in entry["from"][:1]]
    assert Counter(name for entry in first for name in entry["from"]) == Counter(source.keys())


def test_the_record_of_a_distributed_checkpoint(checkpoint, inline, tmp_path):
    source = checkpoint("deepseek_v3", **MTP)
    inline("hf-to-megatron", source, tmp_path / "megatron")
    record = json.loads((tmp_path / "megatron" / "conversion.json").read_text())
    tensors = weights(source)
    assert record["sources"].keys() == tensors.keys()
    assert all(entry["xxh3_128"] == digest(tensors[name]) for name, entry in record["sources"].items())
    assert Counter(name for entry in record["targets"] for name in entry["from"]) == Counter(tensors.keys())
    gate = next(e for e in record["targets"] if e["from"] == ["model.layers.2.mlp.experts.5.gate_proj.weight"])
    assert gate["key"] == "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    assert (gate["offset"], gate["shape"], gate["of"]) == ([5, 0, 0], [1, 32, 64], [8, 64, 64])
    assert gate["xxh3_128"] == digest(tensors[gate["from"][0]])
    qkv = next(e for e in record["targets"] if e["name"] == "mtp.layers.0.eh_proj.weight")
    assert qkv["from"] == ["model.layers.4.eh_proj.weight"]
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert back["sources"].keys() == {entry["name"] for entry in record["targets"]}
    assert {n: e["xxh3_128"] for n, e in back["sources"].items()} == {
        entry["name"]: entry["xxh3_128"] for entry in record["targets"]
    }


def test_an_untied_table_equals_the_embedding(checkpoint, inline, tmp_path):
    source = checkpoint("qwen2", dtype="bfloat16", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights(source)
    changes = {"tie_word_embeddings": False, "rope_theta": 50000.0, "max_position_embeddings": 4096}
    outcome = inline("hf-to-megatron", source, tmp_path / "megatron", changes=changes)
    assert sorted(edit.name for edit in outcome.edits) == [
        "max_position_embeddings", "rope_parameters", "tie_word_embeddings",
    ]  # fmt: skip
    assert "config.json: tie_word_embeddings: true -> false" in [str(edit) for edit in outcome.edits]
    assert "config.json: max_position_embeddings: 2048 -> 4096" in [str(edit) for edit in outcome.edits]
    record = json.loads((tmp_path / "megatron" / "conversion.json").read_text())
    assert record["edits"] == [str(edit) for edit in outcome.edits]
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert_same(ours, theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"]})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["max_position_embeddings"]) == (False, 4096)
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    with pytest.raises(ValueError, match="tie_word_embeddings=true: the checkpoint has its own output table"):
        inline("hf-to-megatron", tmp_path / "back", tmp_path / "tied", changes={"tie_word_embeddings": True})


def test_tables_of_different_content_are_refused(checkpoint, inline, tmp_path):
    """The multi-token-prediction layer's tables are the model's; where they are not, nothing is lost in silence."""

    def change(tensors):
        tensors["model.layers.4.embed_tokens.weight"][0, 0] += 1

    source = changed(checkpoint("deepseek_v3", **MTP), tmp_path / "source", change)
    with pytest.raises(ConversionError, match=r"layers\.4\.embed_tokens\.weight: differs from model\.embed_tokens"):
        inline("hf-to-megatron", source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.experts.3.down_proj", "layers.2.mlp.experts.0.up_proj", "layers.0.mlp.gate_proj"]
)
def test_dtypes_that_megatron_has_no_place_for_are_refused(checkpoint, inline, tmp_path, name):
    """Gate and up, and the experts of a layer, are one tensor there: it would round the one that is finer."""
    name = f"model.{name}.weight"

    def change(tensors):
        tensors[name] = tensors[name].float() * 1.001

    source = changed(checkpoint("deepseek_v3", dtype="bfloat16"), tmp_path / "source", change)
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.mlp.*: got .*; must be .* Megatron keeps both"):
        inline("hf-to-megatron", source, tmp_path / "megatron")
    assert not (tmp_path / "megatron.partial").exists()
    inline("hf-to-hf", source, tmp_path / "bf16", dtype="bf16")
    inline("hf-to-megatron", tmp_path / "bf16", tmp_path / "megatron")


@pytest.mark.parametrize("name", ["deepseek_v3-mtp", "qwen2-tied", "llama"])
def test_transformers_computes_the_same_with_the_result(checkpoint, inline, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, options = FAMILIES[name]
    source = checkpoint(family, **options)
    changes = {"tie_word_embeddings": False} if name == "qwen2-tied" else {}
    inline.limits(part=50_000, file=100_000)
    inline("hf-to-megatron", source, tmp_path / "megatron")
    inline("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", dtype="bf16", changes=changes)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "back").encode("What is 3 plus 4?")])
    logits = []
    for folder in (source, tmp_path / "back"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        logits.append(model(input_ids=tokens).logits)
    assert tokens.numel() > 10 and logits[0].float().std() > 0.1
    assert torch.equal(*logits)
    # negative control: other weights give other logits
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] += 1
    assert not torch.equal(model(input_ids=tokens).logits, logits[0])
