"""Bytes of one rank of every pipeline stage in each phase of a round, at the phase's worst instant.

A phase's peak is what the rank holds all through it (weights, gradients, optimizer state) and the largest of the
instants named beside it. Gradients are fp32 sums in a buffer of their own; with bf16 parameters the optimizer holds
fp32 master weights and two moments of its share, which is 1/(dp x cp) of dense and 1/expert_dp of expert parameters
(`train.optimizer`; ZeRO-1). In fp32 the master weights are the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from r1mega.plan.activations import Layers, Pack, Term
from r1mega.plan.held import Held

_MIN_BUCKET = 40_000_000  # elements of a bucket with overlapped reductions, at least (Megatron's default)
_INNER = 16  # algo.logprobs works a chunk's fp32 numbers out in so many parts

Bytes = dict[str, float]


@dataclass(frozen=True)
class States:
    """How parameters and what belongs to them are held.

    `offloads`: gradients and optimizer state leave the device while engines generate and until the next update.
    `steps_in_place`: Adam is a fused kernel, as Megatron takes it from Transformer Engine or apex wherever one of them
    is installed; torch's own makes a copy of one moment.
    `optimizer_on_host`: the share of master weights and moments that never is on the device (other systems; not ours).
    """

    params: int = 2  # bytes of a parameter
    moments: int = 4
    offloads: bool = False
    steps_in_place: bool = True
    optimizer_on_host: float = 0.0

    @property
    def master(self) -> int:
        """Bytes of an fp32 master weight besides the parameter. With bf16 moments Megatron's precision-aware optimizer
        stores only the 16 bits that a bf16 parameter lacks (`store_param_remainders`)."""
        if self.params == 4:
            return 0
        return 2 if self.moments == 2 else 4

    @property
    def step(self) -> float:
        """Bytes a parameter that Adam's step needs besides: with bf16 moments Transformer Engine's FusedAdam makes both
        of them fp32 for all parameters of a kind at once."""
        if self.moments == 2:
            return 8.0
        return 0.0 if self.steps_in_place else 4.0


class StageMemory:
    """Memory of the ranks of one stage.

    Args:
        held: what they hold.
        layers: their saved tensors, and with them the model and the layout.
        pack: the largest micro-batch, whole: before it is cut over cp.
        micro_batches: of an update, on each data-parallel part.
        trains_mtp: whether the multi-token-prediction layer is computed.
    """

    def __init__(
        self, held: Held, layers: Layers, states: States, pack: Pack, micro_batches: int, *, trains_mtp: bool = False
    ) -> None:
        self.held, self.layers, self.states = held, layers, states
        self.fields, self.layout, self.compute = layers.fields, layers.layout, layers.compute
        self.pack = pack.cut(self.layout.cp)
        self.micro_batches, self.trains_mtp = micro_batches, trains_mtp
        self.is_first, self.is_last = held.stage == 0, held.stage == self.layout.pp - 1

    # What is held through a phase

    @property
    def weights(self) -> float:
        """Parameters and gate biases."""
        return self.states.params * self.held.parameters + 4 * self.held.gate_biases

    @property
    def gradients(self) -> float:
        """fp32 sums of all trained parameters."""
        return 4.0 * self.held.trained

    @property
    def shares(self) -> tuple[float, float]:
        """Dense and expert parameters whose optimizer state the rank has."""
        layout = self.layout
        return self.held.dense / (layout.dp * layout.cp), self.held.experts / layout.expert_dp

    @property
    def optimizer(self) -> float:
        """Master weights and moments, wherever they are."""
        return (self.states.master + 2 * self.states.moments) * sum(self.shares)

    @property
    def fp8_weights(self) -> float:
        """Transformer Engine keeps the FP8 blocks of linear weights, as they are and transposed, from their first use
        on; moving the weights to host memory leaves them."""
        if not self.compute.fp8:
            return 0.0
        tables = self._table * (int(self.is_first) + int(self.is_last and not self.fields.has_score))
        return 2.0 * max(0.0, self.held.parameters - tables)

    @property
    def on_device(self) -> Bytes:
        """What an update works on."""
        return {
            **self._for_passes(),
            "gradients": self.gradients,
            "optimizer": self.optimizer * (1 - self.states.optimizer_on_host),
        }

    def _for_passes(self) -> Bytes:
        """What a forward pass works on."""
        return {"weights": self.weights} | ({"weights in FP8": self.fp8_weights} if self.compute.fp8 else {})

    # Phases

    def train(self) -> Bytes:
        """A forward and backward pass and the step after it."""
        parts = self.on_device
        saved = self.in_flight()
        peaks = {
            "activations, layers computed backward": saved + self.backward(),
            "activations, head computed backward": saved + self.head_backward() if self.is_last else 0.0,
            "gradient of the embedding": self.states.params * self._table if self.is_first else 0.0,
            "optimizer step": self.states.step * max(self.shares),
        }
        worst = max(peaks, key=lambda name: peaks[name])
        return {**parts, worst: peaks[worst]}

    def logprobs(self, *, reference: bool = False) -> Bytes:
        """A forward pass without gradients; of the reference's weights, while the policy's stay beside them."""
        parts = self._for_passes() if self.states.offloads else dict(self.on_device)
        if reference:
            parts["reference"] = self.weights
        return {**parts, "forward pass": max(self.forward(), self.head_forward() if self.is_last else 0.0)}

    def reward_models(self, weights: float) -> Bytes:
        """A forward pass of a frozen reward model, whose weights come to the device for it, beside the policy's.

        One model at a time. It sees no more tokens at once than the policy's log-probs do, and makes no logits.
        """
        parts = self._for_passes() if self.states.offloads else dict(self.on_device)
        return {**parts, "reward model": weights, "forward pass": self.forward()}

    def publish(self, buckets: float) -> Bytes:
        """Weights beside the buffers that they leave in."""
        parts = self._for_passes() if self.states.offloads else dict(self.on_device)
        return {**parts, "buckets": buckets}

    def rollout(self) -> Bytes:
        """What the trainer leaves on the device while engines generate."""
        if not self.states.offloads:
            return dict(self.on_device)
        return {"weights in FP8": self.fp8_weights} if self.compute.fp8 else {}

    def checkpoint(self, *, has_reference: bool, overlaps: bool) -> Bytes:
        """All of it, and either one kind of optimizer state, gathered over its data-parallel ranks, or the reference.

        Megatron's fully reshardable format gathers a bucket's state by NCCL, in fp32, beside the rank's own part of it;
        without overlapped reductions a bucket is all dense, or all expert, parameters (`distrib_optimizer`,
        `get_parameter_state_dp_zero`).
        """
        sizes = zip((self.held.dense, self.held.experts), self.shares, strict=True)
        gathered = max(4.0 * (whole + share) for whole, share in sizes)
        if overlaps:
            gathered = min(gathered, 8.0 * max(_MIN_BUCKET, 1_000_000 * self.layout.dp * self.layout.cp))
        reference = self.weights if has_reference else 0.0
        worst = "optimizer state, gathered" if gathered >= reference else "reference"
        return {**self.on_device, worst: max(gathered, reference)}

    def host(self, *, has_reference: bool, reward_models: float = 0.0) -> Bytes:
        """Host memory that the rank keeps, pinned copies as large as PyTorch makes them (the next power of two).

        `reward_models` are the bytes of the frozen ones' weights, which are pinned tensor by tensor.
        """
        found: Bytes = {}
        if reward_models:
            found["reward models"] = reward_models * _PINNED_MEAN
        if has_reference:
            found["reference"] = self.weights
        if self.states.offloads:
            dense = self.states.params * (self.held.dense + self.held.frozen)
            experts = self.states.params * self.held.experts
            found["weights"] = _pinned(dense) + _pinned(experts)
            found["optimizer"] = self.optimizer * (1 - self.states.optimizer_on_host) * _PINNED_MEAN
        if self.states.optimizer_on_host:
            found["optimizer, held there"] = self.optimizer * self.states.optimizer_on_host
        return found

    def checkpoint_host(self, *, has_reference: bool) -> Bytes:
        """Host memory while a checkpoint is written: on every rank three fp32 numbers of each of its parameters, whole,
        and copies of the weights on their way to the files."""
        copies = self.weights * (2 if has_reference else 1)
        kept = self.weights if has_reference else 0.0
        return {"reference": kept, "optimizer state, gathered": 12.0 * self.held.trained, "weights, copied": copies}

    # Instants

    def in_flight(self) -> float:
        """Activations of all micro-batches whose backward pass is still to come, at the most."""
        layers = self.layers
        total, boundary = 0.0, self.compute.itemsize * layers.h * self.pack.tokens / self.layout.tp
        for count, chunk in zip(self._waiting(), self._chunks(), strict=True):
            saved = sum(layers.saved(self.pack, moe=moe) for moe in chunk)
            # Megatron keeps what a stage hands on until its gradient comes.
            total += count * (saved + (0 if self.is_last else boundary) + _sum(layers.head(self.pack)))
        if self.is_last:
            total += _sum(layers.tail(self.pack))
            total += _sum(layers.further(self.pack)) if self.trains_mtp else 0.0
        return total

    def backward(self) -> float:
        """Beyond what is saved: a layer's recomputed tensors, and what its backward pass makes."""
        kinds = {moe for chunk in self._chunks() for moe in chunk} or {False}
        return max(self._recomputed(moe) + self._working(moe) for moe in kinds) + self._emulation()

    def _recomputed(self, moe: bool) -> float:
        whole = Layers(self.fields, self.layout, replace(self.compute, recompute="none"))
        terms = _sum(whole.layer(self.pack, moe=moe))
        if self.compute.recompute == "full":
            return terms * self.compute.recompute_num_layers
        return max(0.0, terms - self.layers.saved(self.pack, moe=moe))

    def _working(self, moe: bool) -> float:
        """Gradients of activations, less what a layer has let go by then, and one weight's gradient."""
        layers, e = self.layers, self.compute.itemsize
        tokens, t = self.pack.tokens, self.pack.tokens / self.layout.tp
        stream = 2 * e * layers.h * t
        if moe:
            width = self.fields["moe_intermediate_size"] // self.layout.etp
            # Saved by then is one of the copies of tokens, and with Transformer Engine what the experts made of them.
            made = 0 if self.compute.layer_spec == "torch" else 3 * width
            feed_forward = self._dispatched() - e * (layers.h + made) * layers.copies(self.pack)
        else:
            feed_forward, width = e * 2 * layers.f * tokens, layers.f
        weight = e * 2 * layers.h * width
        let_go = sum(
            term.nbytes
            for term in layers.layer(self.pack, moe=moe)
            if term.part in ("mlp", "experts", "shared", "router", "norm2")
        )
        inner = layers.n * (2 * layers.dq + 2 * layers.dv)
        attention = (e * inner + 4 * layers.n * layers.dq) * tokens
        return stream + weight + max(feed_forward, attention - let_go)

    def forward(self) -> float:
        """A forward pass that saves nothing: the stream, and the larger half of a layer."""
        layers, e = self.layers, self.compute.itemsize
        tokens, t = self.pack.tokens, self.pack.tokens / self.layout.tp
        whole = Layers(self.fields, self.layout, replace(self.compute, recompute="none"))
        stream = 3 * e * layers.h * t
        attention = 2 * _sum(whole.core(self.pack))
        halves = [attention]
        if any(moe for chunk in self._chunks() for moe in chunk):
            halves.append(self._dispatched())
        if any(not moe for chunk in self._chunks() for moe in chunk):
            halves.append((5 if self.compute.layer_spec == "torch" else 3) * e * layers.f * tokens)
        return stream + max(halves) + self._emulation()

    def _emulation(self) -> float:
        """What emulated FP8 makes of the largest operand of a product, five copies of 4 bytes: itself, scaled, rounded,
        the exponents, and the result of the product."""
        layers = self.layers
        widest = max(layers.h, 2 * layers.f, layers.n * layers.dq)
        return 5 * 4 * widest * max(layers.h, self.pack.tokens) if self.compute.emulates_fp8 else 0.0

    def _dispatched(self) -> float:
        """Copies of the experts' tokens that are there at once at the end of a layer's experts: as they came (and, with
        ep > 1, as they were sent), sorted by expert, the outputs; of plain torch the outputs twice, one by one and
        together, of Transformer Engine gate and up and their product instead. In fp32 where etp sums them."""
        layers, e = self.layers, self.compute.itemsize
        h, width = layers.h, self.fields["moe_intermediate_size"] // self.layout.etp
        tokens = (3 + (self.layout.ep > 1)) * e * h
        tokens += e * (h if self.compute.layer_spec == "torch" else 3 * width)
        tokens += 4 * h if self.layout.etp > 1 else 0
        return tokens * layers.copies(self.pack)

    def head_forward(self) -> float:
        """Logits of a chunk, and thrice a sixteenth of them in fp32."""
        e, rows = self.compute.itemsize, min(self.pack.responses, self.compute.chunk_tokens)
        hidden = e * self.layers.h * (self.pack.responses + self.pack.tokens)
        if self.fields.has_score:
            return e * self.layers.h * self.pack.tokens
        return hidden + self.layers.vocab * (e * rows + 3 * 4 * self._inner_rows)

    def head_backward(self) -> float:
        """Logits of a chunk again, the fp32 sum of the table's gradient, a chunk's part of it, the hidden states'."""
        e, responses = self.compute.itemsize, self.pack.responses
        if self.fields.has_score:  # the gradient of the hidden states, whole
            return e * self.layers.h * self.pack.tokens
        again = 0 if responses <= self.compute.chunk_tokens else self.compute.chunk_tokens
        table = (4 + e) * self._table
        return table + self.layers.vocab * (e * again + 2 * 4 * self._inner_rows) + e * self.layers.h * responses

    @property
    def _inner_rows(self) -> float:
        return min(self.compute.chunk_tokens, self.pack.responses) / _INNER

    @property
    def _table(self) -> float:
        """Elements of this rank's rows of the vocabulary's table."""
        return self.layers.vocab * self.layers.h

    def _chunks(self) -> list[list[bool]]:
        """Of each chunk of layers of this stage: which layers have experts."""
        counts = self.layout.chunk_layers(self.fields["num_hidden_layers"])
        moe, found, first = self.fields.moe_layers, [], 0
        for chunk, count in enumerate(counts):
            if chunk % self.layout.pp == self.held.stage:
                found.append([layer in moe for layer in range(first, first + count)])
            first += count
        return found

    def _waiting(self) -> list[int]:
        """Micro-batches of each chunk whose activations are held when the first backward pass begins: 1F1B holds one
        for each stage that follows, and its own; interleaved, as Narayanan et al. 2021 (section 2.2) order them."""
        layout, stage = self.layout, self.held.stage
        if layout.vpp == 1:
            return [min(layout.pp - stage, self.micro_batches)]
        ahead = min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, self.micro_batches * layout.vpp)
        held = [0] * layout.vpp
        for number in range(ahead):
            held[number // layout.pp % layout.vpp] += 1
        return held


def _sum(terms: Iterable[Term]) -> float:
    return sum(term.nbytes for term in terms)


_PINNED_MEAN = 1.44  # 1 / ln 2: mean of 2^ceil(log2 x) / x for sizes without a favourite


def _pinned(nbytes: float) -> float:
    """PyTorch's allocator of pinned memory rounds up to a power of two (`CachingHostAllocator`)."""
    return float(1 << (int(nbytes) - 1).bit_length()) if nbytes >= 1 else 0.0
