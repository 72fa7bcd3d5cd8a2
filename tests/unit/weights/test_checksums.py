"""Checksums of what an engine must hold: against parameters put together with torch, and every kind of fault named."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.tiny_checkpoints import SHAPES
from r1mega.models.hf_fields import HfFields, parse
from r1mega.models.tables import slots_of
from r1mega.weights.checksums import ExpectedChecksums, Mismatch, compare, reported_by_rank, sampled
from r1mega.weights.engine_hash import CpuHash, GpuHash, hash_for
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, EngineParam, Part, engine_params

CPU = EngineBuild(device="cpu")


def fields_of(family: str, **overrides: Any) -> HfFields:
    shape = {**SHAPES[family], "num_hidden_layers": 2, "rms_norm_eps": 1e-6, **overrides}
    return parse({"model_type": family, **shape})


def tensors_of(fields: HfFields) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator)
        for slot in slots_of(fields)
        for tensor in slot.tensors
    }


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def expected_of(params: list[EngineParam], tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, str]:
    checksums = ExpectedChecksums(params, dtype=torch.bfloat16, device="cpu", **options)
    for name, tensor in tensors.items():
        checksums.add(name, tensor)
    return checksums.result()


def test_a_dense_rank_against_torch():
    fields = fields_of("qwen2", tie_word_embeddings=False)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(fields).items()}
    got = expected_of(engine_params(fields, EngineLayout(tp=2), 1, CPU), tensors)
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    second = [tensors[f"{attention}.{name}_proj.weight"].chunk(2)[1] for name in "qkv"]
    assert got[f"{attention}.qkv_proj.weight"] == sha(torch.cat(second))
    assert got[f"{attention}.o_proj.weight"] == sha(tensors[f"{attention}.o_proj.weight"][:, 32:])
    table = torch.cat([tensors["lm_head.weight"], torch.zeros(384 - 323, 64).bfloat16()])
    assert got["lm_head.weight"] == sha(table[192:])
    # 96 rows of MLP, padded to 128: the second rank has 32 of them.
    held = [
        torch.cat([tensors[f"{mlp}.{name}_proj.weight"], torch.zeros(32, 64)]).bfloat16() for name in ("gate", "up")
    ]
    assert got[f"{mlp}.gate_up_proj.weight"] == sha(torch.cat([one[64:] for one in held]))
    down = torch.cat([tensors[f"{mlp}.down_proj.weight"], torch.zeros(64, 32)], 1).bfloat16()
    assert got[f"{mlp}.down_proj.weight"] == sha(down[:, 64:])


def test_experts_and_their_gate_against_torch():
    fields = fields_of("deepseek_v3")
    tensors = tensors_of(fields)
    got = expected_of(engine_params(fields, EngineLayout(tp=2, ep=2), 1), tensors)
    prefix = "model.layers.1.mlp"
    halves = [
        torch.cat([tensors[f"{prefix}.experts.{e}.{name}_proj.weight"] for name in ("gate", "up")])
        for e in (4, 5, 6, 7)
    ]
    assert got[f"{prefix}.experts.w13_weight"] == sha(torch.stack(halves).bfloat16())
    bias = tensors[f"{prefix}.gate.e_score_correction_bias"]
    assert got[f"{prefix}.gate.e_score_correction_bias"] == sha(bias) != sha(bias.bfloat16())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_does_not_matter(seed: int, device: str):
    fields = fields_of("deepseek_v3")
    params = engine_params(fields, EngineLayout(tp=2), 0, CPU)
    tensors = tensors_of(fields)
    shuffled = list(tensors.items())
    random.Random(seed).shuffle(shuffled)
    results = []
    for items in (tensors.items(), shuffled):
        checksums = ExpectedChecksums(params, dtype=torch.bfloat16, device=device)
        memory = torch.empty(1 << 16, dtype=torch.bfloat16)  # nothing has to be converted: what is held must be a copy
        for name, tensor in items:  # the sender reuses its buffer
            view = memory[: tensor.numel()].view(tensor.shape).copy_(tensor)
            checksums.add(name, view)
        results.append(checksums.result())
        assert checksums.held_bytes == 0
    assert results[0] == results[1]


def test_in_the_order_of_a_checkpoint_little_is_held():
    fields = fields_of("deepseek_v3")
    checksums = ExpectedChecksums(engine_params(fields, EngineLayout(), 0), dtype=torch.bfloat16)
    most = 0
    for name, tensor in tensors_of(fields).items():
        checksums.add(name, tensor)
        most = max(most, checksums.held_bytes)
    assert most == 0
    backwards = ExpectedChecksums(engine_params(fields, EngineLayout(), 0), dtype=torch.bfloat16)
    for expert in reversed(range(1, 8)):
        name = f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"
        backwards.add(name, torch.zeros(32, 64))
    assert backwards.held_bytes == 7 * 32 * 64 * 2


@pytest.fixture(scope="module")
def published() -> tuple[list[EngineParam], dict[str, torch.Tensor], dict[str, str]]:
    fields = fields_of("deepseek_v3")
    params = engine_params(fields, EngineLayout(tp=2), 1)
    tensors = tensors_of(fields)
    return params, tensors, expected_of(params, tensors)


def test_equal_checksums_are_no_mismatch(published):
    params, _, expected = published
    assert compare(params, expected, dict(expected)) == []


def test_one_flipped_bit_is_found_and_named(published):
    params, tensors, expected = published
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    flipped = tensors[name].bfloat16()
    flipped.view(torch.int16)[20, 5] ^= 1
    reported = expected_of(params, tensors | {name: flipped})
    (mismatch,) = compare(params, expected, reported)
    assert (mismatch.param, mismatch.kind) == ("model.layers.1.mlp.experts.w13_weight", "different")
    assert name in mismatch.tensors
    assert "w13_weight: the engine's is not what was published (from model.layers.1.mlp.experts.0.gate" in str(mismatch)


def test_a_stale_tensor_is_found_and_named(published):
    params, tensors, expected = published
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    (mismatch,) = compare(params, expected, expected_of(params, tensors | {name: tensors[name] + 1}))
    assert mismatch.param == "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight"
    assert mismatch.tensors == ("model.layers.0.self_attn.q_a_proj.weight", name)


def test_gate_and_up_in_each_others_place_are_found(published):
    params, tensors, expected = published
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    found = compare(params, expected, expected_of(params, tensors | {gate: tensors[up], up: tensors[gate]}))
    assert [(mismatch.param, mismatch.tensors) for mismatch in found] == [
        ("model.layers.0.mlp.gate_up_proj.weight", (gate, up))
    ]


def test_a_gate_bias_rounded_to_bf16_is_found(published):
    params, tensors, expected = published
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    (mismatch,) = compare(params, expected, expected_of(params, tensors | {name: tensors[name].bfloat16()}))
    assert mismatch == Mismatch(name, (name,), "different")


def test_names_of_one_side_alone_are_found(published):
    params, _, expected = published
    reported = dict(expected)
    del reported["model.norm.weight"]
    reported["model.layers.0.self_attn.bias"] = "0" * 16
    assert compare(params, expected, reported) == [
        Mismatch("model.norm.weight", ("model.norm.weight",), "missing"),
        Mismatch("model.layers.0.self_attn.bias", (), "unknown"),
    ]


def test_tensors_that_never_came_are_named(published):
    params, tensors, _ = published
    name = "model.layers.1.mlp.experts.7.gate_proj.weight"
    with pytest.raises(ValueError, match=rf"w13_weight: {name} never came$"):
        expected_of(params, {other: tensor for other, tensor in tensors.items() if other != name})
    with pytest.raises(ValueError, match=r"and 12 more never came"):
        expected_of(params, {other: tensor for other, tensor in tensors.items() if "experts." not in other})


def test_tensors_of_another_shape_twice_or_of_others(published):
    params, tensors, _ = published
    checksums = ExpectedChecksums(params, dtype=torch.bfloat16)
    assert not checksums.add("model.layers.2.enorm.weight", torch.ones(64))
    assert checksums.add("model.norm.weight", torch.ones(64))
    with pytest.raises(ValueError, match="model.norm.weight: came twice"):
        checksums.add("model.norm.weight", torch.ones(64))
    with pytest.raises(ValueError, match=r"got \[24, 64\]; must be \[64, 24\]|got \[64, 24\]; must be \[24, 64\]"):
        checksums.add("model.layers.0.self_attn.q_a_proj.weight", torch.ones(64, 24))


def test_a_sample_sees_everything_in_a_few_versions(published):
    params, tensors, expected = published
    for share in (0.3, 0.25, 1.0, 0.001):
        versions = range(5, 5 + min(-int(-1 // share), 200))
        chosen = [[param.name for param in sampled(params, version, share)] for version in versions]
        assert chosen[0] == [param.name for param in sampled(params, 5, share)]
        assert all(0 < len(names) <= len(params) * share + 1 for names in chosen)
        assert {name for names in chosen for name in names} == {param.name for param in params}
    some = sampled(params, 7, 0.25)
    part = expected_of(some, tensors)
    assert part == {param.name: expected[param.name] for param in some}
    wrong = dict(expected) | {some[0].name: "0" * 16}
    assert [mismatch.param for mismatch in compare(params, part, wrong)] == [some[0].name]
    for share in (0, 1.1, -1, float("nan")):
        with pytest.raises(ValueError, match="share of the parameters"):
            sampled(params, 1, share)


def test_the_answer_of_an_engine_is_taken_apart():
    def rank(number: int, *drafts: str) -> dict[str, Any]:
        names = ["a", *(f"{role}.a" for role in drafts)]
        infos = [{"rank": number, "role": role} for role in ("target", *drafts)]
        return {"checksums": dict.fromkeys(names, f"{number:016x}"), "parallelism_info": infos}

    answer = {"success": True, "message": "Success.", "ranks": [rank(1, "draft"), rank(0, "draft_step_0")]}
    assert reported_by_rank(answer) == {1: {"a": "0" * 15 + "1"}, 0: {"a": "0" * 16}}
    with pytest.raises(ValueError, match="engine failed: no"):
        reported_by_rank({"success": False, "message": "no"})
    with pytest.raises(ValueError, match="not an answer"):
        reported_by_rank({"success": True, "message": "Success."})
    assert reported_by_rank({**answer, "ranks": [rank(0), rank(1), rank(0), rank(1)]}) == reported_by_rank(answer)
    other = rank(0) | {"checksums": {"a": "1" * 16}}
    with pytest.raises(ValueError, match="rank 0 reported twice, of a not the same"):
        reported_by_rank({**answer, "ranks": [rank(0), other]})


def gpu_hash_by_the_word(data: bytes) -> str:
    """The same hash one word at a time, in Python's integers."""
    mask = (1 << 32) - 1
    words = [int.from_bytes(data[at : at + 4].ljust(4, b"\0"), "little") for at in range(0, len(data), 4)]

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
        return x ^ (x >> 16)

    seeds = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & mask)
    total = 0
    for tile in range(0, len(words), 8192):
        sums = [0, 0]
        for at in range(tile, min(tile + 8192, len(words))):
            for half, (factor, turn) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                turned = ((at << turn) | (at >> (32 - turn))) & mask
                place = ((at * factor + seeds[half]) & mask) ^ turned
                sums[half] = (sums[half] + mix(words[at] ^ place)) & mask
        high, low = (mix(one ^ (len(words) * 4) & mask) for one in sums)
        total = (total + (high << 32) + low) & ((1 << 64) - 1)
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return f"{total ^ (total >> 31):016x}"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 3, 4, 7, 1000, 32764, 32768, 40001]), min_size=1, max_size=4), st.integers(0, 99))
def test_both_hashes_in_pieces_are_those_of_the_whole(sizes: list[int], seed: int):
    data = random.Random(seed).randbytes(sum(sizes))
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cpu, gpu = CpuHash(), GpuHash(len(data))
    for piece in whole.split(sizes):
        cpu.update(piece)
        gpu.update(piece)
    assert cpu.hex() == hashlib.sha256(data).hexdigest()[:16]
    assert gpu.hex() == gpu_hash_by_the_word(data)


@pytest.mark.parametrize(
    ("size", "told"), [(5, "734f38267db36804"), (8193, "174b0d77607e7bfa"), (49229, "b32fa954c63a583d")]
)
def test_the_hash_of_cuda_is_that_of_the_kernel(size: int, told: str):
    """The kernel of SGLang 0.5.21 printed these under Triton 3.6's interpreter, of bf16 0, 1, 2, ... 250, 0, 1, ..."""
    tensor = (torch.arange(size) % 251).bfloat16()
    hashed = GpuHash(tensor.nbytes)
    hashed.update(tensor.view(torch.uint8))
    assert hashed.hex() == told


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(ValueError, match="got 'tpu'; must be cpu or cuda"):
        hash_for("tpu", 8)
    with pytest.raises(ValueError, match="below 8 GiB"):
        GpuHash(8 << 30)
    part = Part("a", (2, 3), (0, 0), (2, 3), (0, 0))
    with pytest.raises(ValueError, match="no other device"):
        ExpectedChecksums([EngineParam("a", (2, 3), "served", (part,))], dtype=torch.float32, device="meta")
