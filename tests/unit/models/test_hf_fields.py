"""A config.json is honoured field by field, or refused by name."""

from __future__ import annotations

import json

import pytest

from r1mega.models import hf_fields

# DeepSeek-V3's published config.json, less its quantization and its multi-token-prediction layer.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "ep_size": 1, "vocab_size": 129280, "bos_token_id": 0,
    "eos_token_id": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.46.3", "initializer_range": 0.02, "aux_loss_alpha": 0.001, "seq_aux": True,
    "pretraining_tp": 1,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "vocab_size": 151936, "max_position_embeddings": 4096, "rope_theta": 10000, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_published_config_is_read():
    fields = hf_fields.parse(V3)
    assert fields.family == "deepseek_v3"
    assert fields.rope["rope_type"] == "yarn"
    assert fields.rope["factor"] == 40
    assert fields.dtype == "bfloat16"
    assert fields.shape().num_experts == 256


def test_both_spellings_of_rope_are_one():
    rope = V3["rope_scaling"]
    new = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {name: value for name, value in rope.items() if name != "type"}
    new["rope_parameters"] |= {"rope_type": "yarn", "rope_theta": 10000}
    assert hf_fields.parse(new).rope == hf_fields.parse(V3).rope


def test_absent_optional_fields():
    assert hf_fields.parse({**V3, "q_lora_rank": None})["q_lora_rank"] is None
    fields = hf_fields.parse(QWEN2)
    assert fields.head_dim == 128
    assert fields.rope == {"rope_type": "default", "rope_theta": 10000}


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (V3, {"model_type": "mixtral"}, "model_type: got 'mixtral'; must be one of"),
        (V3, {"quantization_config": {"fmt": "e4m3"}}, "quantization_config"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob: got False"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"attention_bias": True}, "attention_bias"),
        (V3, {"num_experts_per_tok": 4}, "num_experts_per_tok = 2 x topk_group"),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: got type 'linear'"),
        (V3, {"rope_scaling": {**V3["rope_scaling"], "truncate": False}}, "rope_scaling.truncate"),
        (V3, {"index_topk": 2048}, "index_topk: got 2048; this field is not honoured for deepseek_v3"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN2, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN2, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling: got type 'llama3'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(base, change, words):
    with pytest.raises(ValueError) as error:
        hf_fields.parse({**base, **change})
    assert words in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="kv_lora_rank: missing"):
        hf_fields.parse({name: value for name, value in V3.items() if name != "kv_lora_rank"})


def test_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        hf_fields.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        hf_fields.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert hf_fields.read(tmp_path).family == "qwen2"
