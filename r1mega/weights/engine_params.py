"""The parameters of SGLang's model object on one engine rank, and where the bytes of each come from. No torch.

Restated from SGLang 0.5.21: `srt/models/{qwen2,llama,deepseek_v2}.py`, `models/deepseek_common/deepseek_weight_loader`,
`layers/{linear,vocab_parallel_embedding}.py`, `layers/moe/fused_moe_triton/layer.py`, the ranks of `runtime_context.py`
and, for engines on CPU, `configs/update_config.py`. Names are those of `model.named_parameters()`, which its
`/weights_checker` reports: a tied output table is not among them, and neither are the tables of rotary embeddings.

How the ranks cut: attention over `tp / attn_dp` neighbours, MLPs and shared experts over tp, routed experts over
`tp / ep` neighbours of one expert rank, the vocabulary (padded to 64 rows) over the attention's ranks where it is the
embedding and over tp where it is the output. Fewer KV heads than ranks are held by several. What is left is zeros.

On CPU, and there alone, SGLang pads what its ranks do not divide: intermediate sizes to 32 x tp (also where tp divides
them), KV heads to tp, and query heads as they follow.

Not covered; a server with one of these reports other names, shapes or bytes, and each would be told as a mismatch:
- the multi-token-prediction layer: a model of its own in SGLang, whose checksums come under another `role`;
- pipeline stages, redundant or moved experts, `--moe-dp-size`, context parallel attention;
- FP8 and any other quantisation: the checker hashes what it dequantises, not what was sent;
- weights that SGLang reorders in place after loading: on a CPU with AMX (all linears are packed), and routed experts
  under the MoE runners flashinfer_trtllm (blocks, padded to 128), flashinfer_cutlass (up before gate), triton_kernels
  (transposed), aiter, or SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED (gate and up row by row; off by default). The runner triton
  keeps them as they are;
- `--rl-on-policy-target` (embedding and last norm in fp32) and SGLANG_ENABLE_EMBED_REPLICATION.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1mega.models.hf_fields import HfFields
from r1mega.weights.engine_layout import EngineLayout

Shape = tuple[int, ...]

_VOCABULARY_PADDING = 64
_CPU_PADDING = 32  # of intermediate sizes, for each rank
_FUSING_EXPERTS = 256  # the count of routed experts at which SGLang fuses the shared one


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a Hugging Face tensor in an engine's parameter.

    Args:
        tensor: the Hugging Face tensor's name, and `whole` its shape.
        offset: where the rectangle begins in the tensor.
        shape: of the rectangle.
        at: where it begins in the parameter. Parameters of experts have a dim more than the tensor, before its own.
    """

    tensor: str
    whole: Shape
    offset: Shape
    shape: Shape
    at: Shape


@dataclass(frozen=True, slots=True)
class EngineParam:
    """One parameter of an engine rank.

    Args:
        name: SGLang's.
        shape: on this rank.
        dtype_kind: "served", the dtype that the engine serves the model in, or "fp32".
        parts: in row-major order, none over another, each from the first column on. Elsewhere it is zeros.
    """

    name: str
    shape: Shape
    dtype_kind: str
    parts: tuple[Part, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of."""
        return tuple(dict.fromkeys(part.tensor for part in self.parts))


@dataclass(frozen=True)
class EngineBuild:
    """What else decides an engine's parameters: its device and some of its flags.

    Args:
        device: "cuda" or "cpu".
        fuse_shared_experts: whether the shared expert stands as the last routed one. None: as SGLang decides, which is
            on CUDA with 256 routed experts, a single shared one and ep=1. `--disable-shared-experts-fusion` is False.
        whole_shared_experts: every rank holds the shared experts whole: any `--moe-a2a-backend`, which also does not
            fuse them, or SGLANG_SHARED_EXPERT_TP1.
        whole_dense_mlps: every rank holds the dense layers' MLPs whole: `--moe-dense-tp-size 1`.
        dp_lm_head: the output table is cut as attention is: `--enable-dp-lm-head`.
    """

    device: str = "cuda"
    fuse_shared_experts: bool | None = None
    whole_shared_experts: bool = False
    whole_dense_mlps: bool = False
    dp_lm_head: bool = False


@dataclass(frozen=True, slots=True)
class _Span:
    """What a rank has of one dim: `count` of the tensor's from `first` on, then zeros until `width`."""

    first: int
    count: int
    width: int

    @staticmethod
    def whole(size: int) -> _Span:
        return _Span(0, size, size)

    @staticmethod
    def cut(size: int, padded: int, index: int, ranks: int) -> _Span:
        width = padded // ranks
        first = min(index * width, size)
        return _Span(first, min(width, size - first), width)


@dataclass(frozen=True, slots=True)
class _Block:
    """A rank's part of one tensor: of its rows, and of its columns where it has any."""

    tensor: str
    whole: Shape
    spans: tuple[_Span, ...]

    @property
    def widths(self) -> Shape:
        return tuple(span.width for span in self.spans)

    def parts(self, at: Shape) -> Iterator[Part]:
        shape = tuple(span.count for span in self.spans)
        if all(shape):
            yield Part(self.tensor, self.whole, tuple(span.first for span in self.spans), shape, at)


def engine_params(
    fields: HfFields, layout: EngineLayout, rank: int, build: EngineBuild | None = None
) -> list[EngineParam]:
    """Every parameter of rank `rank` of an engine, in the order of SGLang's modules.

    Raises:
        ValueError: all that is wrong: a layout that cannot be, a rank that is not there, sizes that the ranks do not
            divide, or a build that SGLang does not offer.
    """
    build = build or EngineBuild()
    found = layout.problems(fields["n_routed_experts"] if fields.is_moe else 0)
    if not found and not 0 <= rank < layout.num_ranks:
        found.append(f"engine rank: got {rank}; must be below {layout.num_ranks}; name one that the engine has")
    found = found or _problems(fields, layout, build)
    if found:
        raise ValueError("\n".join(found))
    return list(_Rank(fields, layout, rank, build).params())


def fuses_shared_experts(fields: HfFields, layout: EngineLayout, build: EngineBuild) -> bool:
    """Whether the engine holds the shared expert as its last routed one."""
    if build.fuse_shared_experts is not None or not fields.is_moe:
        return bool(build.fuse_shared_experts)
    return (
        build.device == "cuda"
        and layout.ep == 1
        and not build.whole_shared_experts
        and (fields["n_routed_experts"], fields["n_shared_experts"]) == (_FUSING_EXPERTS, 1)
    )


def _problems(fields: HfFields, layout: EngineLayout, build: EngineBuild) -> list[str]:
    """Why SGLang could not build the model so, as `field: got VALUE; CONSTRAINT; REMEDY`."""
    if build.device not in ("cuda", "cpu"):
        return [f"engine device: got {build.device!r}; must be cuda or cpu; no other device's padding is known"]
    found = []
    if layout.attn_dp > 1 and not fields.is_moe:
        found.append(
            f"engine.attn_dp: got {layout.attn_dp}; SGLang cuts the attention of {fields.family} over all of tp; "
            "set it to 1"
        )
    if build.fuse_shared_experts and (not fields.is_moe or fields["n_shared_experts"] != 1 or layout.ep > 1):
        found.append("engine fuse_shared_experts: got True; needs one shared expert and ep=1; leave it unset")
    if build.fuse_shared_experts and build.whole_shared_experts:
        found.append("engine whole_shared_experts: got True with fuse_shared_experts; only one can be; choose it")
    if build.device == "cpu":
        return found
    attn_tp, moe_tp = layout.tp // layout.attn_dp, layout.tp // layout.ep
    sizes = [("num_attention_heads", attn_tp)]
    if not build.whole_dense_mlps or not fields.is_moe:
        sizes.append(("intermediate_size", layout.tp))
    if fields.is_moe:
        shared_cut = not build.whole_shared_experts and not fuses_shared_experts(fields, layout, build)
        sizes.append(("moe_intermediate_size", moe_tp))
        shared = fields["moe_intermediate_size"] * fields["n_shared_experts"]
        if shared_cut and shared % layout.tp:
            found.append(f"engine.tp: got {layout.tp}; must divide the shared experts' {shared} rows; lower it")
    for name, ranks in sizes:
        if fields[name] % ranks:
            found.append(f"engine.tp: got {layout.tp}; its {ranks} ranks must divide {name} = {fields[name]}; lower it")
    heads = fields["num_key_value_heads"]
    if not fields.is_moe and max(heads, layout.tp) % min(heads, layout.tp):
        found.append(f"engine.tp: got {layout.tp}; must divide num_key_value_heads = {heads} or be divided by it")
    if _up(fields["vocab_size"], _VOCABULARY_PADDING) % layout.tp:
        found.append(f"engine.tp: got {layout.tp}; must divide vocab_size padded to {_VOCABULARY_PADDING}")
    return found


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _Rank:
    """One rank of one engine. Sizes ending in `_padded` are those that the ranks cut."""

    def __init__(self, fields: HfFields, layout: EngineLayout, rank: int, build: EngineBuild) -> None:
        self.fields, self.layout, self.build = fields, layout, build
        self.rank = rank % layout.tp
        self.attn_tp, self.moe_tp = layout.tp // layout.attn_dp, layout.tp // layout.ep
        self.on_cpu = build.device == "cpu"
        self.hidden = fields["hidden_size"]
        self.fused = fuses_shared_experts(fields, layout, build)
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.heads_padded, self.kv_heads_padded = heads, kv_heads
        if self.on_cpu and (heads % layout.tp or kv_heads % layout.tp):
            self.kv_heads_padded = _up(kv_heads, layout.tp)
            self.heads_padded = self.kv_heads_padded * (heads // kv_heads)

    def params(self) -> Iterator[EngineParam]:
        fields = self.fields
        yield self._table("model.embed_tokens.weight", self.attn_tp)
        for layer in range(fields["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            yield from self._latent_attention(prefix) if fields.is_moe else self._grouped_attention(prefix)
            if fields.is_moe and layer >= fields["first_k_dense_replace"]:
                yield from self._experts(f"{prefix}.mlp")
            else:
                ranks = 1 if fields.is_moe and self.build.whole_dense_mlps else self.layout.tp
                yield from self._mlp(f"{prefix}.mlp", fields["intermediate_size"], ranks)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield self._vector(f"{prefix}.{name}.weight", self.hidden)
        yield self._vector("model.norm.weight", self.hidden)
        if not fields["tie_word_embeddings"]:
            yield self._table("lm_head.weight", self.attn_tp if self.build.dp_lm_head else self.layout.tp)

    def _table(self, name: str, ranks: int) -> EngineParam:
        """A table of the vocabulary, padded, cut by rows."""
        size = self.fields["vocab_size"]
        padded = _up(size, _VOCABULARY_PADDING)
        if padded % ranks:  # on CPU alone: elsewhere it was refused
            padded = _up(size, _VOCABULARY_PADDING * ranks)
        rows = _Span.cut(size, padded, self.rank % ranks, ranks)
        return _stacked(name, [self._rows(name, size, self.hidden, rows)])

    def _grouped_attention(self, prefix: str) -> Iterator[EngineParam]:
        """qwen2 and llama: q, k and v in one parameter, each rank's heads of q above those of k above those of v."""
        fields, attention, tp = self.fields, f"{prefix}.self_attn", self.layout.tp
        width = fields.head_dim
        heads, kv_heads = fields["num_attention_heads"] * width, fields["num_key_value_heads"] * width
        kv_ranks = min(tp, self.kv_heads_padded)  # more ranks than heads: neighbours hold the same head
        kv_rank = self.rank // (tp // kv_ranks)
        query = _Span.cut(heads, self.heads_padded * width, self.rank, tp)
        keys = _Span.cut(kv_heads, self.kv_heads_padded * width, kv_rank, kv_ranks)
        spans = {"q": (heads, query), "k": (kv_heads, keys), "v": (kv_heads, keys)}
        weights = [self._rows(f"{attention}.{n}_proj.weight", size, self.hidden, at) for n, (size, at) in spans.items()]
        yield _stacked(f"{attention}.qkv_proj.weight", weights)
        if fields.family == "qwen2":
            biases = [_Block(f"{attention}.{n}_proj.bias", (size,), (at,)) for n, (size, at) in spans.items()]
            yield _stacked(f"{attention}.qkv_proj.bias", biases)
        yield self._columns(f"{attention}.o_proj.weight", self.hidden, heads, query)

    def _latent_attention(self, prefix: str) -> Iterator[EngineParam]:
        """deepseek_v3: what leads down to the latents is on every rank, what leads up from them is cut by heads."""
        fields, attention = self.fields, f"{prefix}.self_attn"
        q_rank, kv_rank = fields["q_lora_rank"], fields["kv_lora_rank"]
        nope, rope, value = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"], fields["v_head_dim"]
        down = self._all(f"{attention}.kv_a_proj_with_mqa.weight", kv_rank + rope, self.hidden)
        if q_rank is None:
            yield self._heads(f"{attention}.q_proj.weight", nope + rope, self.hidden)
            yield _stacked(down.tensor, [down])
        else:
            query_down = self._all(f"{attention}.q_a_proj.weight", q_rank, self.hidden)
            yield _stacked(f"{attention}.fused_qkv_a_proj_with_mqa.weight", [query_down, down])
            yield self._vector(f"{attention}.q_a_layernorm.weight", q_rank)
            yield self._heads(f"{attention}.q_b_proj.weight", nope + rope, q_rank)
        yield self._heads(f"{attention}.kv_b_proj.weight", nope + value, kv_rank)
        columns = self._head_span(value)
        yield self._columns(f"{attention}.o_proj.weight", self.hidden, fields["num_attention_heads"] * value, columns)
        yield self._vector(f"{attention}.kv_a_layernorm.weight", kv_rank)

    def _experts(self, prefix: str) -> Iterator[EngineParam]:
        """The gate, this rank's routed experts in two parameters, and the shared ones."""
        fields, experts = self.fields, self.fields["n_routed_experts"]
        ffn = fields["moe_intermediate_size"]
        gate = self._all(f"{prefix}.gate.weight", experts, self.hidden)
        yield _stacked(gate.tensor, [gate])
        yield self._vector(f"{prefix}.gate.e_score_correction_bias", experts, "fp32")
        local = experts // self.layout.ep
        first = self.layout.expert_block(self.rank) * local
        names = [f"{prefix}.experts.{expert}" for expert in range(first, first + local)]
        if self.fused:
            names.append(f"{prefix}.shared_experts")
        held = [self._gated(name, ffn, self.rank % self.moe_tp, self.moe_tp) for name in names]
        yield _of_experts(f"{prefix}.experts.w13_weight", [blocks[:2] for blocks in held])
        yield _of_experts(f"{prefix}.experts.w2_weight", [blocks[2:] for blocks in held])
        shared = fields["n_shared_experts"]
        if shared and not self.fused:
            ranks = 1 if self.build.whole_shared_experts else self.layout.tp
            yield from self._mlp(f"{prefix}.shared_experts", ffn, ranks, shared)

    def _mlp(self, prefix: str, ffn: int, ranks: int, times: int = 1) -> Iterator[EngineParam]:
        gate, up, down = self._gated(prefix, ffn, self.rank % ranks, ranks, times)
        yield _stacked(f"{prefix}.gate_up_proj.weight", [gate, up])
        yield _stacked(f"{prefix}.down_proj.weight", [down])

    def _gated(self, prefix: str, ffn: int, index: int, ranks: int, times: int = 1) -> tuple[_Block, _Block, _Block]:
        """gate and up [times * ffn, hidden] and down [hidden, times * ffn], cut along ffn, which alone is padded."""
        padded = _up(ffn, _CPU_PADDING * self.layout.tp) if self.on_cpu else ffn
        size, span = times * ffn, _Span.cut(times * ffn, times * padded, index, ranks)
        gate, up = (self._rows(f"{prefix}.{name}_proj.weight", size, self.hidden, span) for name in ("gate", "up"))
        return gate, up, _Block(f"{prefix}.down_proj.weight", (self.hidden, size), (_Span.whole(self.hidden), span))

    def _head_span(self, width: int) -> _Span:
        """A rank's heads of latent attention, each of `width`."""
        heads = self.fields["num_attention_heads"] * width
        return _Span.cut(heads, self.heads_padded * width, self.rank % self.attn_tp, self.attn_tp)

    def _heads(self, name: str, width: int, columns: int) -> EngineParam:
        """A weight [heads * width, columns], cut by heads."""
        rows = self.fields["num_attention_heads"] * width
        return _stacked(name, [self._rows(name, rows, columns, self._head_span(width))])

    @staticmethod
    def _rows(name: str, rows: int, columns: int, span: _Span) -> _Block:
        return _Block(name, (rows, columns), (span, _Span.whole(columns)))

    @classmethod
    def _all(cls, name: str, rows: int, columns: int) -> _Block:
        return cls._rows(name, rows, columns, _Span.whole(rows))

    @staticmethod
    def _columns(name: str, rows: int, columns: int, span: _Span) -> EngineParam:
        return _stacked(name, [_Block(name, (rows, columns), (_Span.whole(rows), span))])

    @staticmethod
    def _vector(name: str, size: int, dtype_kind: str = "served") -> EngineParam:
        return _stacked(name, [_Block(name, (size,), (_Span.whole(size),))], dtype_kind)


def _stacked(name: str, blocks: Sequence[_Block], dtype_kind: str = "served") -> EngineParam:
    """Blocks of one width, one above the other."""
    parts: list[Part] = []
    row, rest = 0, blocks[0].widths[1:]
    for block in blocks:
        parts += block.parts((row, *(0 for _ in rest)))
        row += block.widths[0]
    return EngineParam(name, (row, *rest), dtype_kind, tuple(parts))


def _of_experts(name: str, experts: Sequence[Sequence[_Block]]) -> EngineParam:
    """[experts, rows, columns]: of each expert its blocks, one above the other."""
    parts: list[Part] = []
    rows = 0
    for expert, blocks in enumerate(experts):
        rows = 0
        for block in blocks:
            parts += block.parts((expert, rows, 0))
            rows += block.widths[0]
    return EngineParam(name, (len(experts), rows, experts[0][0].widths[1]), "served", tuple(parts))
