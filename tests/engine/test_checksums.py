"""The real SGLang reports the checksums that are expected of it, in layouts that `test_generation` has no server of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.models.hf_fields import read
from r1mega.weights.checksums import ExpectedChecksums, compare, reported_by_rank
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, EngineParam, engine_params

sys.path.insert(0, str(Path(__file__).parent))
from where import DEVICE

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}  # with YaRN, tp=2 does not start on CPU
# What a checkpoint is, and how its engine is laid out. All sizes that SGLang pads on CPU are padded in one of them.
CASES: dict[str, tuple[dict[str, Any], EngineLayout, str]] = {
    "qwen2-bf16": ({"family": "qwen2"}, EngineLayout(), "bfloat16"),
    "qwen2-tied-tp2": ({"family": "qwen2", "tie_word_embeddings": True}, EngineLayout(tp=2), "float32"),
    "llama-one_kv_head-tp2": ({"family": "llama", "num_key_value_heads": 1}, EngineLayout(tp=2), "float32"),
    "deepseek_v3-bf16": ({"family": "deepseek_v3", "n_shared_experts": 2}, EngineLayout(), "bfloat16"),
    "deepseek_v3-tp2": ({"family": "deepseek_v3", "rope_parameters": PLAIN_ROPE}, EngineLayout(tp=2), "float32"),
    "deepseek_v3-whole_query-tp2-ep2": (
        {"family": "deepseek_v3", "rope_parameters": PLAIN_ROPE, "q_lora_rank": None},
        EngineLayout(tp=2, ep=2),
        "float32",
    ),
    "deepseek_v3-tp2-attn_dp2": (
        {"family": "deepseek_v3", "rope_parameters": PLAIN_ROPE},
        EngineLayout(tp=2, attn_dp=2),
        "float32",
    ),
}


def expected_of(directory: Path, params: list[EngineParam], dtype: str) -> dict[str, str]:
    checksums = ExpectedChecksums(params, dtype=getattr(torch, dtype), device=DEVICE)
    for name, tensor in load_file(directory / "model.safetensors").items():
        checksums.add(name, tensor)
    return checksums.result()


@pytest.mark.parametrize("case", list(CASES))
def test_every_parameter_is_as_expected(
    case: str,
    model_dir: Callable[..., Path],
    serve: Callable[..., Any],
    record_property: Callable[[str, object], None],
) -> None:
    options, layout, dtype = CASES[case]
    start, later = (model_dir(**options, seed=seed) for seed in (0, 1))
    fields = read(start)
    sizes = {"tp": layout.tp, "ep": layout.ep, "attn_dp": layout.attn_dp}
    with serve(start, extra_args=["--dtype", dtype], **sizes) as server:
        reported = reported_by_rank(server.post("/weights_checker", action="checksum"))
        assert set(reported) == set(range(layout.num_ranks))
        answer = server.post("/update_weights_from_disk", model_path=str(later))
        assert answer["success"], answer
        reported_later = reported_by_rank(server.post("/weights_checker", action="checksum"))
    agreed = 0
    for rank in range(layout.num_ranks):
        params = engine_params(fields, layout, rank, EngineBuild(device=DEVICE))
        expected, expected_later = (expected_of(directory, params, dtype) for directory in (start, later))
        assert not list(map(str, compare(params, expected, reported[rank])))
        assert not list(map(str, compare(params, expected_later, reported_later[rank])))
        stale = {mismatch.param for mismatch in compare(params, expected_later, reported[rank])}
        padding = {param.name for param in params if not param.parts}
        assert stale == set(expected) - padding, "other weights in the same parameters have the same checksums"
        agreed += len(params)
    record_property("parameters that agreed", agreed)


def test_a_name_that_the_engine_skips_is_named(
    model_dir: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    """SGLang takes a load with a name that it does not know for a success; that parameter stays as it was."""
    start, later = (model_dir("deepseek_v3", seed=seed) for seed in (0, 1))
    skipped = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors = load_file(later / "model.safetensors")
    wrong = {
        name.replace("experts.3.up_proj", "experts.3.w3") if name == skipped else name: tensors[name]
        for name in tensors
    }
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with serve(start) as server:
        answer = server.post("/update_weights_from_disk", model_path=str(tmp_path))
        assert answer["success"], answer
        reported = reported_by_rank(server.post("/weights_checker", action="checksum"))[0]
    params = engine_params(read(start), EngineLayout(), 0, EngineBuild(device=DEVICE))
    (mismatch,) = compare(params, expected_of(later, params, "float32"), reported)
    assert (mismatch.param, mismatch.kind) == ("model.layers.2.mlp.experts.w13_weight", "different")
    assert skipped in mismatch.tensors
