"""Checkpoint names against what transformers writes to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from r1mega.rollout.hf_weights import WeightTable

COMMON = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
DEEPSEEK = dict(
    **COMMON,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_key_value_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=6,
)
CONFIGS = {
    "deepseek_v3": lambda: DeepseekV3Config(**DEEPSEEK),
    "deepseek_v3_no_q_lora": lambda: DeepseekV3Config(**{**DEEPSEEK, "q_lora_rank": None}),
    "qwen2": lambda: Qwen2Config(**COMMON, num_key_value_heads=1),
    "qwen2_tied": lambda: Qwen2Config(**COMMON, num_key_value_heads=1, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**COMMON, num_key_value_heads=2),
}


def _model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Every parameter and persistent buffer random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


@pytest.fixture
def deepseek(tmp_path: Path) -> tuple[WeightTable, dict[str, torch.Tensor]]:
    _model(CONFIGS["deepseek_v3"](), 0).save_pretrained(tmp_path)
    return WeightTable(_model(CONFIGS["deepseek_v3"](), 1)), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_on_disk_is_loaded_exactly(name: str, tmp_path: Path) -> None:
    source, target = _model(CONFIGS[name](), 0), _model(CONFIGS[name](), 1)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = WeightTable(target)
    assert table.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    table.load(reversed(tensors.items()))  # any order
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_the_names_are_those_of_single_experts(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    shapes = deepseek[0].shapes
    assert shapes["model.layers.1.mlp.experts.3.gate_proj.weight"] == (8, 16)
    assert shapes["model.layers.1.mlp.experts.3.down_proj.weight"] == (16, 8)
    assert shapes["model.layers.1.mlp.gate.e_score_correction_bias"] == (4,)
    assert not any("gate_up_proj" in name for name in shapes)


def test_tensors_are_cast(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    table.load((name, tensor.bfloat16()) for name, tensor in tensors.items())


def test_unknown_names_are_refused(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    for name in ("model.layers.1.mlp.experts.4.gate_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"):
        with pytest.raises(ValueError, match=f"{name}.*no such tensor"):
            table.load([*tensors.items(), (name, torch.zeros(8, 16))])


def test_tied_output_embeddings_have_no_name() -> None:
    table = WeightTable(_model(CONFIGS["qwen2_tied"](), 0))
    with pytest.raises(ValueError, match="lm_head.weight.*no such tensor"):
        table.load([("lm_head.weight", torch.zeros(24, 16))])


def test_missing_tensors_are_named(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    for lost in ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"):
        with pytest.raises(ValueError, match=f"1 of {len(tensors)} weights were not delivered: {lost}"):
            table.load((name, tensor) for name, tensor in tensors.items() if name != lost)
    with pytest.raises(ValueError, match=f"and {len(tensors) - 8} more"):
        table.load([])


def test_wrong_shapes_are_refused(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(ValueError, match=r"up_proj.weight': got shape \[16, 8\], the model has \[8, 16\]"):
        table.load({**tensors, name: tensors[name].T}.items())
    with pytest.raises(ValueError, match=r"norm.weight': got shape \[1\]"):  # copy_ would have broadcast it
        table.load({**tensors, "model.norm.weight": torch.ones(1)}.items())


def test_tensors_that_need_a_scale_are_refused(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    for dtype in (torch.float8_e4m3fn, torch.int8):
        with pytest.raises(ValueError, match="needs a scale"):
            table.load({**tensors, "model.norm.weight": torch.ones(16).to(dtype)}.items())


def test_a_tensor_comes_once(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    with pytest.raises(ValueError, match="model.norm.weight' was delivered twice"):
        table.load([*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])])


def test_layers_of_multi_token_prediction_are_ignored(deepseek: tuple[WeightTable, dict[str, torch.Tensor]]) -> None:
    table, tensors = deepseek
    table.load([*tensors.items(), ("model.layers.2.eh_proj.weight", torch.zeros(16, 32))])
    with pytest.raises(ValueError, match="model.layers.3.eh_proj.weight"):  # the config names one such layer
        table.load([*tensors.items(), ("model.layers.3.eh_proj.weight", torch.zeros(16, 32))])
    dense = _model(CONFIGS["llama"](), 0)
    with pytest.raises(ValueError, match="model.layers.2.mlp.gate_proj.weight"):
        WeightTable(dense).load([("model.layers.2.mlp.gate_proj.weight", torch.zeros(20, 16))])
