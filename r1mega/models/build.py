"""The Megatron models of this rank's pipeline stage, from a validated config.json."""

from __future__ import annotations

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from r1mega.models.gpt import HiddenStateGPT
from r1mega.models.hf_config import ModelOptions, padded_vocab_size, transformer_config
from r1mega.models.hf_fields import HfFields
from r1mega.models.layer_spec import decoder_spec, mark_expert_parameters, mtp_spec
from r1mega.parallel.groups import Groups


def build_chunks(fields: HfFields, groups: Groups, options: ModelOptions) -> list[HiddenStateGPT]:
    """The models of this rank's chunks of layers, one unless the pipeline is interleaved, with unfilled weights.

    Fill them through `models.shard.ShardedModel` before use. A forward takes input_ids [1, T / cp], position_ids
    [1, T / cp] and PackedSequences, and returns hidden states [T / cp / tp, 1, hidden]; the last chunk's `head` gives
    what logits are made of.
    """
    config = transformer_config(fields, groups.layout, options)
    return [_chunk(fields, groups, options, config, index) for index in range(groups.layout.vpp)]


def _chunk(
    fields: HfFields, groups: Groups, options: ModelOptions, config: TransformerConfig, index: int
) -> HiddenStateGPT:
    layout = groups.layout
    chunk = index * layout.pp + groups.coordinate.pp
    is_last = chunk == layout.num_chunks - 1
    vp_stage = index if layout.vpp > 1 else None
    model = HiddenStateGPT(
        config=config,
        transformer_layer_spec=decoder_spec(config, options.layer_spec, vp_stage, emulate_fp8=options.emulate_fp8),
        vocab_size=padded_vocab_size(fields, layout),
        max_sequence_length=fields["max_position_embeddings"],
        pre_process=chunk == 0,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=fields["tie_word_embeddings"] and not fields.has_score,
        position_embedding_type="rope",
        rotary_base=fields.rope["rope_theta"],
        mtp_block_spec=_mtp(config, options, vp_stage) if is_last and fields.num_mtp_layers else None,
        pg_collection=groups.collection,
        vp_stage=vp_stage,
    )
    if fields.has_score and is_last:
        # Not cut: a single row. Under the name of what it replaces, which Megatron's checkpoints ask for.
        model.output_layer = torch.nn.Linear(fields["hidden_size"], 1, bias=False, dtype=options.params_dtype)
    if fields.rope["rope_type"] == "llama3":
        model.rotary_pos_emb.inv_freq = _llama3_inverse_frequencies(fields).to(groups.device)
    if options.freezes_mtp and model.mtp_process:
        model.mtp.requires_grad_(False)
    mark_expert_parameters(model)
    return model.to(groups.device)


def _mtp(config: TransformerConfig, options: ModelOptions, vp_stage: int | None) -> ModuleSpec:
    return mtp_spec(config, options.layer_spec, vp_stage, emulate_fp8=options.emulate_fp8)


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
