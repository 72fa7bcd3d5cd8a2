"""The Megatron model of this rank's pipeline stage, from a validated config.json."""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from r1mega.models.gpt import HiddenStateGPT
from r1mega.models.hf_config import ModelOptions, padded_vocab_size, transformer_config
from r1mega.models.hf_fields import HfFields
from r1mega.models.layer_spec import decoder_spec, mark_expert_parameters
from r1mega.parallel.groups import Groups


def build_model(fields: HfFields, groups: Groups, options: ModelOptions) -> HiddenStateGPT:
    """The stage's model with unfilled weights: fill it through `models.hf_io.load` before use.

    Its forward takes input_ids [1, T], position_ids [1, T] and PackedSequences, and returns hidden states [T / tp, 1,
    hidden]; the last stage's `logits` makes logits of them.
    """
    config = transformer_config(fields, groups.layout, options)
    model = HiddenStateGPT(
        config=config,
        transformer_layer_spec=decoder_spec(config, options.layer_spec),
        vocab_size=padded_vocab_size(fields, groups.layout),
        max_sequence_length=fields["max_position_embeddings"],
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=fields["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=fields.rope["rope_theta"],
        pg_collection=groups.collection,
    )
    if fields.rope["rope_type"] == "llama3":
        model.rotary_pos_emb.inv_freq = _llama3_inverse_frequencies(fields).to(groups.device)
    mark_expert_parameters(model)
    return model.to(groups.device)


def _llama3_inverse_frequencies(fields: HfFields) -> torch.Tensor:
    """[head_dim / 2] from transformers: Megatron's own scaling fixes three of the four numbers of the recipe."""
    config = LlamaConfig(
        hidden_size=fields["hidden_size"],
        num_attention_heads=fields["num_attention_heads"],
        head_dim=fields.head_dim,
        max_position_embeddings=fields["max_position_embeddings"],
        rope_parameters=dict(fields.rope),
    )
    inverse_frequencies, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    return inverse_frequencies
