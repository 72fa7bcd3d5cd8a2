"""Rows that several families share. A row maps one Megatron parameter to its Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import QKV, Cut, GateUp, HfTensor, Slot, Vocabulary, Whole

SCORE = "score.weight"
"""What transformers' *ForSequenceClassification calls the head of a reward model."""


def embedding(fields: HfFields, *aliases: str) -> Slot:
    """The embedding; `aliases` are other names it goes by in the checkpoint."""
    shape = (fields["vocab_size"], fields["hidden_size"])
    return Slot(
        "embedding.word_embeddings.weight",
        (HfTensor("model.embed_tokens.weight", shape),),
        Vocabulary(shape[0]),
        place="first",
        aliases=tuple(HfTensor(alias, shape) for alias in aliases),
    )


def head(fields: HfFields, alias: str | None = None) -> Iterator[Slot]:
    """The final norm and the output table; a tied table is the embedding's, held again by the last stage.

    A reward model has a row that gives the score instead, on every tensor rank.
    """
    hidden, vocab = fields["hidden_size"], fields["vocab_size"]
    norm = HfTensor("model.norm.weight", (hidden,), "norm")
    final = Slot("decoder.final_layernorm.weight", (norm,), Whole(), axis=None, place="last")
    # Where a multi-token-prediction layer follows, Megatron keeps the norm with the last decoder layer.
    yield replace(final, place="layer", layer=fields["num_hidden_layers"] - 1) if fields.num_mtp_layers else final
    if fields.has_score:
        yield Slot("output_layer.weight", (HfTensor(SCORE, (1, hidden)),), Whole(), axis=None, place="last")
        return
    tied = fields["tie_word_embeddings"]
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    yield Slot(
        "output_layer.weight",
        (HfTensor(source, (vocab, hidden)),),
        Vocabulary(vocab),
        place="last",
        is_copy=tied,
        aliases=(HfTensor(alias, (vocab, hidden)),) if alias else (),
    )


def norm(megatron: str, hf: str, size: int, layer: int) -> Slot:
    return Slot(
        f"decoder.layers.{layer}.{megatron}.weight",
        (HfTensor(f"model.layers.{layer}.{hf}.weight", (size,), "norm"),),
        Whole(),
        axis=None,
        layer=layer,
    )


def linear(megatron: str, hf: str, shape: tuple[int, int], layer: int, dim: int | None, *, fp8: bool = True) -> Slot:
    """A weight [out, in] cut along `dim` over tp; None: whole on every rank."""
    return Slot(
        f"decoder.layers.{layer}.{megatron}.weight",
        (HfTensor(f"model.layers.{layer}.{hf}.weight", shape, fp8=fp8),),
        Whole() if dim is None else Cut(dim),
        axis=None if dim is None else "tp",
        layer=layer,
    )


def gated_mlp(
    megatron: str, hf: str, hidden: int, ffn: int, layer: int, *, axis: str = "tp", expert: int | None = None
) -> Iterator[Slot]:
    """SwiGLU: gate_proj and up_proj [ffn, hidden] -> linear_fc1; down_proj [hidden, ffn] -> linear_fc2."""
    gate, up, down = (
        HfTensor(f"model.layers.{layer}.{hf}.{name}_proj.weight", shape, fp8=True)
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn)))
    )
    prefix = f"decoder.layers.{layer}.{megatron}"
    yield Slot(f"{prefix}.linear_fc1.weight", (gate, up), GateUp(), axis=axis, layer=layer, expert=expert)
    yield Slot(f"{prefix}.linear_fc2.weight", (down,), Cut(1), axis=axis, layer=layer, expert=expert)


def grouped_query_layer(fields: HfFields, layer: int, *, qkv_bias: bool) -> Iterator[Slot]:
    """One layer of qwen2 or llama."""
    hidden, heads, groups, width = (
        fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"], fields.head_dim,
    )  # fmt: skip
    rows = {"q": heads * width, "k": groups * width, "v": groups * width}
    qkv = QKV(heads, groups, width)
    prefix = f"model.layers.{layer}.self_attn"
    yield norm("input_layernorm", "input_layernorm", hidden, layer)
    weights = tuple(HfTensor(f"{prefix}.{name}_proj.weight", (size, hidden), fp8=True) for name, size in rows.items())
    yield Slot(f"decoder.layers.{layer}.self_attention.linear_qkv.weight", weights, qkv, layer=layer)
    if qkv_bias:
        biases = tuple(HfTensor(f"{prefix}.{name}_proj.bias", (size,), "zero") for name, size in rows.items())
        yield Slot(f"decoder.layers.{layer}.self_attention.linear_qkv.bias", biases, qkv, layer=layer)
    yield linear("self_attention.linear_proj", "self_attn.o_proj", (hidden, heads * width), layer, 1)
    yield norm("pre_mlp_layernorm", "post_attention_layernorm", hidden, layer)
    yield from gated_mlp("mlp", "mlp", hidden, fields["intermediate_size"], layer)
