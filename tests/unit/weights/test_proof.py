"""What all ranks of a server must report: what several hold alike is hashed once, and told of each."""

from __future__ import annotations

import pytest
import torch

from parity.tiny_checkpoints import SHAPES
from r1mega.models.hf_fields import parse
from r1mega.models.tables import slots_of
from r1mega.weights.checksums import ExpectedChecksums
from r1mega.weights.engine_hash import CpuHash
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineParam, engine_params
from r1mega.weights.proof import PublishProof, build_of

FIELDS = parse({"model_type": "deepseek_v3", **SHAPES["deepseek_v3"], "num_hidden_layers": 2, "rms_norm_eps": 1e-6})
LAYOUTS = {
    "tp=2": EngineLayout(tp=2),
    "tp=2,ep=2": EngineLayout(tp=2, ep=2),
    "tp=4,ep=4,attn_dp=4": EngineLayout(tp=4, ep=4, attn_dp=4),
    "tp=2,dp=2": EngineLayout(tp=2, dp=2),
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.float32 if slot.fp32 else torch.bfloat16)
        for slot in slots_of(FIELDS)
        for tensor in slot.tensors
    }


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """Bytes of everything that is hashed."""
    found: list[int] = []
    update = CpuHash.update

    def counted(own: CpuHash, nbytes: torch.Tensor) -> None:
        found.append(nbytes.nbytes)
        update(own, nbytes)

    monkeypatch.setattr(CpuHash, "update", counted)
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_rank_is_told_what_it_would_be_alone(layout: EngineLayout, tensors):
    build = build_of("cpu", ())
    expected = PublishProof(FIELDS, layout, build, torch.bfloat16, 1.0).expect(0)
    for name, tensor in tensors.items():
        if expected.wants(name):
            expected.add(name, tensor)
    found = expected.results()
    assert list(found) == list(range(layout.num_ranks))
    for rank in found:
        alone = ExpectedChecksums(engine_params(FIELDS, layout, rank, build), dtype=torch.bfloat16, device="cpu")
        for name, tensor in tensors.items():
            alone.add(name, tensor)
        assert found[rank] == alone.result()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_held_alike_is_hashed_once(layout: EngineLayout, tensors, hashed):
    build = build_of("cpu", ())
    expected = PublishProof(FIELDS, layout, build, torch.bfloat16, 1.0).expect(0)
    for name, tensor in tensors.items():
        if expected.wants(name):
            expected.add(name, tensor)
    expected.results()
    every = [param for rank in range(layout.num_ranks) for param in engine_params(FIELDS, layout, rank, build)]
    assert sum(hashed) == sum(map(nbytes_of, set(every))) < sum(map(nbytes_of, every))


def test_ranks_that_are_told_one_by_one_are_hashed_each(tensors):
    """Each of them is handed its own tensors, which are to be checked as they are."""
    proof = PublishProof(FIELDS, LAYOUTS["tp=2"], build_of("cpu", ()), torch.bfloat16, 1.0)
    expected = proof.expect(0, ranks=[0, 1])
    for name, tensor in tensors.items():
        for rank in (0, 1):
            if expected.wants(name, rank):
                expected.add(name, tensor * 2 if rank and name == "model.norm.weight" else tensor, rank)
    first, second = expected.results().values()
    differs = {name for name in first if second[name] != first[name]}
    assert "model.norm.weight" in differs and "model.layers.1.input_layernorm.weight" not in differs


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_parameters(share: float, tensors):
    proof = PublishProof(FIELDS, LAYOUTS["tp=4,ep=4,attn_dp=4"], build_of("cpu", ()), torch.bfloat16, share)
    expected = proof.expect(3)
    for name, tensor in tensors.items():
        if expected.wants(name):
            expected.add(name, tensor)
    found = proof.merged([expected.results()], 3)  # raises where one is missing
    assert len(found) == (4 if share else 0)


def nbytes_of(param: EngineParam) -> int:
    return torch.Size(param.shape).numel() * (4 if param.dtype_kind == "fp32" else 2)
