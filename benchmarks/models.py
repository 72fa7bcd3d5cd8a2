"""Small random checkpoints in the Hugging Face format, and their tokenizer, for the benchmarks.

Both families have hidden size 128, 4 layers, 4 heads and about one million parameters, so that a whole GRPO step runs
in about two seconds on two CPU cores. The weights are random: a benchmark of speed needs no skill, and the lengths of
the completions are forced (see `benchmarks.grpo_step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 512
PAD_TOKEN = "<pad>"
# For a qwen2 checkpoint AutoTokenizer rebuilds the tokenizer as a Qwen2Tokenizer, whatever the files say: only a
# byte-level one with this very token comes back unchanged.
EOS_TOKEN = "<|endoftext|>"
FAMILIES = ("qwen2", "deepseek_v3")

# What both families have in common. Untied embeddings, as in the released R1 and its distilled models.
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 448,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "use_cache": True,
}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a checkpoint.

    `active` is what one token passes through: all parameters but those of the experts it was not routed to.
    """

    total: int
    active: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer of `VOCAB_SIZE` entries: the 256 bytes, and filler words to make up the number.

    Ids 0 and 1 are the padding and the end-of-sequence token. Nothing is added around an encoded text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_fillers = VOCAB_SIZE - len(alphabet) - 2
    words = [PAD_TOKEN, EOS_TOKEN, *alphabet, *(f"<w{index}>" for index in range(num_fillers))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, padding_side="left"
    )


def make_config(family: str, pad_token_id: int = 0, eos_token_id: int = 1) -> PreTrainedConfig:
    """The configuration of one of `FAMILIES`.

    deepseek_v3 has one dense layer and three of 8 routed experts (top-4, in 4 groups of which 2 are kept) and a shared
    one, with the sigmoid router and multi-head latent attention of the paper (DeepSeek-V3, section 2.1), without the
    multi-token prediction layer. Raises ValueError on an unknown family.
    """
    ids = {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "bos_token_id": None}
    if family == "qwen2":
        return Qwen2Config(**SHAPE, **ids, num_key_value_heads=2)
    if family == "deepseek_v3":
        return DeepseekV3Config(
            **SHAPE,
            **ids,
            num_key_value_heads=4,
            moe_intermediate_size=48,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            num_mtp_layers=0,
        )
    raise ValueError(f"family: got {family!r}, must be one of {', '.join(FAMILIES)}")


def measure(model: PreTrainedModel) -> ModelSize:
    """Count the parameters of a model of `make_config`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    if routed == 0:
        return ModelSize(total=total, active=total)
    num_experts, num_active = model.config.n_routed_experts, model.config.num_experts_per_tok
    return ModelSize(total=total, active=total - routed * (num_experts - num_active) // num_experts)


def make_model(family: str, out_dir: Path, seed: int = 0) -> ModelSize:
    """Write a random fp32 checkpoint of `family` and its tokenizer to `out_dir`.

    The same seed writes the same weights. Raises ValueError on an unknown family.
    """
    tokenizer = make_tokenizer()
    config = make_config(family, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model_class = Qwen2ForCausalLM if family == "qwen2" else DeepseekV3ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return measure(model)
