"""What a micro-batch's forward pass leaves in memory for its backward pass, term by term.

Each term is a tensor that autograd saves in a layer as `models.layer_spec` builds it, found by asking autograd itself
(`torch.autograd.graph.saved_tensors_hooks`, every storage counted once; tests/unit/plan compares). Letters:

    T  tokens of the pack on this rank (all of it / cp)     t  T / tp: sequence parallel regions hold a part
    h  hidden size     n, g  query and key heads of this rank     d  head width (MLA: dq of q and k, dv of v)
    f  feed-forward width of this rank    N  token copies its experts get: t x top_k x etp, times how uneven
    e  bytes of an activation (bf16 2, fp32 4)     w  bytes of what a linear layer saves of its input (FP8: 1.03)

Where it was taken from: Megatron-Core 0.16.1 `transformer_layer`, `multi_latent_attention`, `moe/token_dispatcher`,
`moe/moe_utils`, `moe/experts`, `mlp`; Transformer Engine's modules save their input, the norm's output and the fused
activation's input alone (Korthikanti et al. 2022, "Reducing Activation Recomputation", counts the same way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout

FP8_BYTES = 1 + 4 / 128  # an element and its share of a block's fp32 scale
MIN_FILL = 0.7  # models.attention pads rows to one length while it fills at least this share


@dataclass(frozen=True)
class Compute:
    """How layers compute: what decides which tensors are saved.

    `on_cpu` is the arithmetic of torch on a CPU, whose norms and attention save more. `keeps_swiglu_in_fp8` is
    DeepSeek-V3's own (section 3.3.3), for comparisons: no configuration of r1mega does it.
    """

    layer_spec: str = "torch"
    itemsize: int = 2
    fp8: bool = False
    emulates_fp8: bool = False  # saves what bf16 saves
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_num_layers: int = 1
    chunk_tokens: int = 1024
    balances: bool = False  # a balance loss by sequence is taken
    unevenness: float = 1.0  # tokens of the fullest rank's experts over the mean
    on_cpu: bool = False
    keeps_swiglu_in_fp8: bool = False

    def drops(self, module: str) -> bool:
        """Whether that module's activations are computed again."""
        return self.recompute == "selective" and module in self.recompute_modules


@dataclass(frozen=True)
class Pack:
    """Sequences end to end in a micro-batch.

    `padded` are the tokens of the rows that plain torch's attention pads them to, `squares` the sum of rows x length^2
    of these; both equal what the lengths say where all are alike (`is_even`).
    """

    longest: int

    tokens: int
    responses: int
    padded: int
    squares: int
    is_even: bool

    @staticmethod
    def of(lengths: Sequence[int], responses: int) -> Pack:
        """The pack of sequences of these lengths."""
        order = sorted(lengths, reverse=True)
        padded = squares = first = 0
        while first < len(order):
            last = first
            while last < len(order) and order[last] >= MIN_FILL * order[first]:
                last += 1
            padded += (last - first) * order[first]
            squares += (last - first) * order[first] ** 2
            first = last
        return Pack(order[0], sum(order), responses, padded, squares, len(set(order)) == 1)

    def cut(self, cp: int) -> Pack:
        """What one context-parallel rank holds of it."""
        tokens, responses, padded, squares = (
            -(-count // cp) for count in (self.tokens, self.responses, self.padded, self.squares)
        )
        return Pack(self.longest, tokens, responses, padded, squares, self.is_even)


@dataclass(frozen=True)
class Term:
    """A saved tensor: what it is, its bytes, the part of the layer it belongs to."""

    what: str
    nbytes: float
    part: str


class Layers:
    """The saved tensors of one rank's layers.

    Args:
        fields: the model's config.json.
        layout: how it is cut.
        compute: how it is computed.
    """

    def __init__(self, fields: HfFields, layout: Layout, compute: Compute) -> None:
        self.fields, self.layout, self.compute = fields, layout, compute
        tp = layout.tp
        self.h = fields["hidden_size"]
        self.n = fields["num_attention_heads"] // tp
        self.is_moe = fields.is_moe
        if self.is_moe:
            self.rope = fields["qk_rope_head_dim"]
            self.dq = fields["qk_nope_head_dim"] + self.rope
            self.dv, self.g = fields["v_head_dim"], self.n
        else:
            self.g = max(1, fields["num_key_value_heads"] // tp)
            self.rope = self.dq = self.dv = fields.head_dim
        self.f = fields["intermediate_size"] // tp
        self.vocab = -(-fields["vocab_size"] // tp)
        self.w = FP8_BYTES if compute.fp8 else compute.itemsize

    def layer(self, pack: Pack, *, moe: bool) -> list[Term]:
        """All that one layer saves with nothing computed again but what `selective` says. `pack` is this rank's."""
        attention = list(self._latent(pack) if self.is_moe else self._grouped(pack))
        feed_forward = list(self._experts(pack) if moe else self._dense(pack))
        return [*attention, *self.core(pack), *feed_forward]

    def saved(self, pack: Pack, *, moe: bool) -> float:
        """Bytes that one layer keeps until its backward pass."""
        if self.compute.recompute == "full":  # the input of a group of layers
            return self.compute.itemsize * self.h * self._t(pack) / self.compute.recompute_num_layers
        return sum(term.nbytes for term in self.layer(pack, moe=moe))

    def head(self, pack: Pack) -> list[Term]:
        """What every layer has in common: the tokens and, where rows are padded, where each stands."""
        lifts = self.compute.layer_spec == "torch" and not pack.is_even
        places = Term("tokens and places", 8 * (pack.tokens + (pack.padded + pack.tokens if lifts else 0)), "head")
        # Latent attention makes its own in each layer.
        turns = 0 if self.is_moe else 4 * self.rope * pack.longest
        return [places, Term("angles of rotary embeddings", turns, "head")]

    def tail(self, pack: Pack) -> list[Term]:
        """What the last stage saves after its layers: the final norm's and the head's; tokens are the first stage's."""
        rows, compute = pack.responses, self.compute
        if self.fields.has_score:  # rows at the ends of sequences alone
            return list(self._norm("final norm", self.h, self._t(pack), "tail"))
        kept = (
            compute.itemsize * self.vocab * rows if rows <= compute.chunk_tokens else 0
        )  # algo.logprobs: a single chunk
        return [
            Term("logits of a single chunk", kept, "tail"),
            *self._norm("final norm", self.h, self._t(pack), "tail"),
            Term("hidden states of response tokens", compute.itemsize * self.h * rows, "tail"),
            Term("targets, rows; maximum and sum of each", (8 + 8 + 4 + 4) * rows, "tail"),
        ]

    def further(self, pack: Pack) -> list[Term]:
        """The multi-token-prediction layer, where it is trained: two norms, what joins them, a layer of experts."""
        t, e = self._t(pack), self.compute.itemsize
        joined = [
            *self._norm("embedding norm", self.h, t, "mtp"),
            *self._norm("hidden norm", self.h, t, "mtp"),
            Term("input of eh_proj", self.w * 2 * self.h * t, "mtp"),
            Term("hidden states of response tokens", e * self.h * pack.responses, "mtp"),
        ]
        if self.compute.recompute == "full":
            return [Term("inputs of the recomputed layer", 2 * e * self.h * t, "mtp"), joined[-1]]
        return [*joined, *self.layer(pack, moe=True)]

    def _t(self, pack: Pack) -> float:
        return pack.tokens / self.layout.tp

    def _norm(self, what: str, width: int, tokens: float, part: str, *, storage: int | None = None) -> Iterator[Term]:
        """A norm's input and one over its root mean square; torch on a CPU saves the input and the normalised in fp32
        instead. `storage` is the width of the tensor that the input is a view of."""
        e = self.compute.itemsize
        if self.compute.on_cpu:
            first = (storage or width) if e == 4 else width
            yield Term(f"{what}: input and normalised, fp32", 4 * (first + width) * tokens, part)
        else:
            yield Term(f"{what}: input", e * (storage or width) * tokens, part)
        yield Term(f"{what}: scale", 4 * tokens, part)

    def _latent(self, pack: Pack) -> Iterator[Term]:
        """Multi-head latent attention up to query, key and value."""
        fields, t, e, w = self.fields, self._t(pack), self.compute.itemsize, self.w
        rank, latent = fields["q_lora_rank"], fields["kv_lora_rank"]
        yield from self._norm("input norm", self.h, t, "norm")
        if not self.compute.drops("layernorm"):
            yield Term("input of the down projections", w * self.h * t, "norm")
        if rank is not None:
            yield from self._norm("query latent norm", rank, t, "latent")
            yield Term("input of the query's up projection", w * rank * t, "latent")
        yield from self._norm("key latent norm", latent, t, "latent", storage=latent + self.rope)
        yield Term("input of the key's up projection", w * latent * t, "latent")
        if self.layout.tp > 1:
            yield Term("rotary key, gathered", e * self.rope * pack.tokens, "latent")
        yield Term("cosines and sines of query and key", 4 * e * self.rope * pack.tokens, "rope")

    def _grouped(self, pack: Pack) -> Iterator[Term]:
        """Grouped-query attention up to query, key and value."""
        t, e = self._t(pack), self.compute.itemsize
        yield from self._norm("input norm", self.h, t, "norm")
        yield Term("input of linear_qkv", self.w * self.h * t, "norm")
        yield Term("cosines and sines of query and key", 4 * e * self.rope * pack.tokens, "rope")

    def core(self, pack: Pack) -> Iterator[Term]:
        """Query, key, value, the output and its log-sum-exp; what surrounds them where rows are padded."""
        e, n, g, compute = self.compute.itemsize, self.n, self.g, self.compute
        lifts = compute.layer_spec == "torch" and not pack.is_even  # rows are copied to be padded, and back
        tokens = pack.tokens * self.layout.cp  # keys and values are gathered over cp
        drops = compute.drops("core_attn")
        inner = pack.tokens * n * self.dv
        if self._is_plain():
            if drops:
                yield from self._core_inputs(pack, tokens)
            else:
                rows = pack.padded * n
                yield Term("query, key, value in fp32, heads repeated", 4 * rows * (2 * self.dq + self.dv), "core")
                yield Term("attention weights in fp32", 4 * n * pack.squares, "core")
            yield Term("input of linear_proj", self.w * inner, "proj")
            return
        if drops or not lifts:
            if not compute.drops("mla_up_proj"):
                yield from self._core_inputs(pack, tokens)
        else:
            padded = pack.padded * self.layout.cp
            yield Term("query, padded", e * pack.padded * n * self.dq, "core")
            yield Term("key and value, padded", e * padded * g * (self.dq + self.dv), "core")
        if not drops:
            yield Term("log-sum-exp", 4 * n * (pack.padded if lifts else pack.tokens), "core")
            if lifts or compute.fp8:  # else linear_proj saves the same tensor
                yield Term("output of attention", e * n * self.dv * (pack.padded if lifts else pack.tokens), "core")
        yield Term("input of linear_proj", self.w * inner, "proj")

    def _core_inputs(self, pack: Pack, tokens: float) -> Iterator[Term]:
        e = self.compute.itemsize
        yield Term("query", e * pack.tokens * self.n * self.dq, "qkv")
        yield Term("key", e * tokens * self.g * self.dq, "qkv")
        # A value of grouped-query attention is a view of what linear_qkv gave, query and key included.
        view = self.n * self.dq + self.g * (self.dq + self.dv) if not self.is_moe and self.layout.cp == 1 else 0
        yield Term("value", e * tokens * (view or self.g * self.dv), "qkv")

    def _is_plain(self) -> bool:
        """Whether attention's weights are written out: no fused kernel takes unequal heads in fp32, nor, on a CPU,
        unequal widths."""
        if self.compute.layer_spec != "torch":
            return False
        if self.compute.on_cpu:
            return self.dq != self.dv
        return self.compute.itemsize == 4 and self.n != self.g

    def _dense(self, pack: Pack) -> Iterator[Term]:
        yield from self._norm("feed-forward norm", self.h, self._t(pack), "norm2")
        yield Term("input of linear_fc1", self.w * self.h * self._t(pack), "norm2")
        if not self.compute.drops("mlp"):
            yield from self._gated("feed-forward", self.f, pack.tokens, "mlp")

    def _gated(self, what: str, width: float, tokens: float, part: str, *, weighed: bool = False) -> Iterator[Term]:
        """SwiGLU: gate and up; torch also saves silu(gate), its factor and, where a router's weight follows, their
        product."""
        e = self.compute.itemsize
        kept = FP8_BYTES if self.compute.keeps_swiglu_in_fp8 else e
        yield Term(f"{what}: gate and up", kept * 2 * width * tokens, part)
        if self.compute.layer_spec == "torch":
            yield Term(f"{what}: silu(gate) and its factor", e * (3 if weighed else 2) * width * tokens, part)
        if not (weighed and self.compute.drops("moe_act")):
            yield Term(f"{what}: input of linear_fc2", self.w * width * tokens, part)

    def _experts(self, pack: Pack) -> Iterator[Term]:
        fields, t, e, compute = self.fields, self._t(pack), self.compute.itemsize, self.compute
        yield from self._norm("expert norm", self.h, t, "norm2")
        if not compute.drops("layernorm"):
            # Router, shared experts and dispatch have it in common. FP8 quantises it for the shared experts beside.
            yield Term("input of router and experts", e * self.h * t, "norm2")
        if compute.drops("moe"):
            return
        shared = fields["moe_intermediate_size"] * fields["n_shared_experts"] // self.layout.tp
        if shared and not compute.drops("shared_experts"):
            if compute.fp8:
                yield Term("input of the shared experts, FP8", self.w * self.h * t, "shared")
            yield from self._gated("shared experts", shared, pack.tokens, "shared")
        experts, top_k = fields["n_routed_experts"], fields["num_experts_per_tok"]
        groups, kept = fields["n_group"], fields["topk_group"]
        chosen = (16 * groups + 8 * kept + experts if groups > 1 else 0) + (8 + 4 + 8) * top_k + 4
        balance = 8 * experts if compute.balances else 0
        yield Term("router: scores, choices, maps", (9 * experts + chosen + balance) * t, "router")
        copies = self.copies(pack)
        width = fields["moe_intermediate_size"] // self.layout.etp
        yield Term("tokens of the experts", self.w * self.h * copies, "experts")
        yield Term("weights of the experts' tokens", 4 * copies, "experts")
        yield from self._gated("experts", width, copies, "experts", weighed=True)

    def copies(self, pack: Pack) -> float:
        """Token copies that the fullest rank's experts compute."""
        uneven = self.compute.unevenness if self.layout.ep > 1 else 1.0
        return self._t(pack) * self.fields["num_experts_per_tok"] * self.layout.etp * uneven
