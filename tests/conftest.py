"""Tiny checkpoints of the three families, and the data samples that some tests look at when they are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_DENSE = {
    "vocab_size": 323, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.08,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DENSE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0, "rope_parameters": YARN,
    },
    "qwen2": {**_DENSE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama": {**_DENSE, "rope_parameters": LLAMA3},
}  # fmt: skip


def write_checkpoint(path: Path, family: str, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """A random checkpoint as transformers itself writes it; norms, biases and gate biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SHAPES[family], **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_((0.02 if name.endswith("bias") else config.initializer_range) * noise)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer():
    """A tokenizer that reads any text: one token a byte, beginning, end and padding after them. 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, **overrides)` -> the directory of a tiny checkpoint, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = family + json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real problems beside the repository; the test is skipped where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real problems are not at hand: {path.name}/ beside the repository is absent")
    return path
