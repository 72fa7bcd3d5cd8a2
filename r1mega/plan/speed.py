"""Seconds of each phase of a round from stated efficiencies (the `plan` section): a comparison of layouts, no promise.

Training: the slowest stage's matrix products at `plan.mfu` of the peak, a third more where layers are computed again
(Chen et al. 2016); the pipeline's bubble, (stages - 1) / (micro-batches x chunks) of them (Narayanan et al. 2021); the
bytes of tensor, context, expert and data-parallel collectives at `plan.network_efficiency` of their links. Generation:
the larger of reading weights and cache and of computing, a step at a time; the longest response ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.choices import Dispatcher, Transport
from r1mega.config.schema import Config
from r1mega.metrics.flops import (
    LatentAttention,
    ModelShape,
    active_parameters,
    forward_flops_per_token,
    mean_context,
    total_parameters,
)
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout
from r1mega.plan.engine import Engine
from r1mega.plan.held import Held
from r1mega.plan.job import Job

Seconds = dict[str, float]


@dataclass(frozen=True)
class Generation:
    """How one engine generates: sequences at once, seconds of a step, tokens that its cache holds."""

    batch: int
    step_seconds: float
    cached_tokens: float


class Speed:
    """Times of a configuration's phases.

    Args:
        shape: of the model; `held`: what the ranks of each stage hold.
    """

    def __init__(
        self, config: Config, fields: HfFields, layout: Layout, job: Job, shape: ModelShape, held: list[Held]
    ) -> None:
        self.config, self.fields, self.layout, self.job = config, fields, layout, job
        self.shape, self.held = shape, held
        self.micro_batches = job.micro_batches(layout)
        self.context = mean_context([max(1, round(job.mean_length))])
        self.itemsize = 4 if str(config.precision.params) == "fp32" else 2

    def flops_per_update(self) -> float:
        """Model FLOPs of an update: forward and backward passes, without log-probs and generation."""
        if not self.job.trains:
            return 0.0
        head = 2 * self.shape.vocab * self.shape.hidden if self.fields.has_score else 0
        return 3 * (forward_flops_per_token(self.shape, self.context) - head) * self.job.tokens_per_update

    def train(self) -> Seconds:
        """Of one update, by what takes them."""
        again = {"full": 4 / 3, "selective": 1.05}.get(str(self.config.memory.recompute), 1.0)
        busy = self._pass(3 * again)
        bubble = busy * (self.layout.pp - 1) / (self.micro_batches * self.layout.vpp)
        moved = {name: nbytes / rate for name, (nbytes, rate) in self._traffic(self._passes).items()}
        return {"compute": busy, "pipeline bubble": bubble, **moved, "optimizer": self._optimizer()}

    def traffic(self) -> dict[str, float]:
        """Bytes that the busiest rank sends in one update, by what for."""
        return {name: nbytes for name, (nbytes, _) in self._traffic(self._passes).items()}

    @property
    def _passes(self) -> float:
        """Forward passes' worth of collectives: forward, backward, and forward again where layers are recomputed."""
        return 3.0 if str(self.config.memory.recompute) == "full" else 2.0

    def logprobs(self, *, rounds: int) -> float:
        """Of so many forward passes over a round's samples."""
        per_update = self._pass(1.0) * (1 + (self.layout.pp - 1) / (self.micro_batches * self.layout.vpp))
        moved = self._traffic(1.0)
        per_update += sum(nbytes / rate for name, (nbytes, rate) in moved.items() if name != "data parallel")
        return rounds * self.job.updates_per_round * per_update

    def generation(self, engine: Engine, engines: int, cache_gib: float) -> Generation:
        """Of engines whose ranks have so much memory for their cache."""
        rollout, plan = self.config.rollout, self.config.plan
        capacity = cache_gib * (1 << 30) / engine.cache_per_token() * engine.attn_dp
        samples = self.job.samples_per_update * self.job.updates_per_round / engines
        limit = rollout.max_in_flight if str(rollout.engine) == "sglang" else rollout.max_batch
        middle = self.job.mean_prompt + self.job.mean_response / 2
        batch = max(1, int(min(limit, samples, capacity / middle)))
        cluster = self.config.cluster
        cache = batch / engine.attn_dp * middle * engine.cache_per_token()
        read = (engine.active_weights(batch) + cache) / (cluster.gpu_memory_gb_per_s * 1e9 * plan.decode_bandwidth)
        flops = 2 * active_parameters(self.shape) * batch / engine.tp
        computed = flops / (cluster.gpu_bf16_tflops * 1e12 * plan.decode_mfu)
        return Generation(batch, max(plan.decode_step_ms / 1e3, read, computed), capacity)

    def rollout(self, generation: Generation, engine: Engine, engines: int) -> float:
        """Of a round: all tokens at the batch's pace, or the longest response alone, and the prompts."""
        job, cluster = self.job, self.config.cluster
        samples = job.samples_per_update * job.updates_per_round / engines
        steady = samples * job.mean_response / generation.batch * generation.step_seconds
        questions = samples / job.samples_per_question
        prefill = 2 * active_parameters(self.shape) * questions * job.mean_prompt / engine.tp
        longest = job.mean_limit * self.config.plan.decode_step_ms / 1e3
        return max(steady, longest) + prefill / (cluster.gpu_bf16_tflops * 1e12 * self.config.plan.mfu)

    def publish(self, engine: Engine, engines: int) -> float:
        """Of bringing the weights to every engine."""
        cluster, plan = self.config.cluster, self.config.plan
        total = engine.weights() * engine.tp
        transport = self.config.sglang.transport
        if transport is Transport.disk or str(self.config.rollout.engine) == "embedded":
            return (1 + engines) * total / (cluster.nodes * cluster.disk_gb_per_s * 1e9)
        if transport is Transport.ipc:
            return engine.weights() / (cluster.node_gb_per_s * 1e9 * plan.network_efficiency)
        return total / (cluster.network_gb_per_s * 1e9 * plan.network_efficiency)

    def checkpoint_bytes(self) -> float:
        """On disk: weights, fp32 master weights and moments, the reference."""
        copies = 2 if self.job.has_reference else 1
        return sum(held.distinct for held in self.held) * (self.itemsize * copies + 12.0)

    def conversion_bytes(self) -> float:
        """Host memory of one worker of tools/convert_checkpoint.py: what it reads of the largest tensor, its value and
        what is written (`conversion.worker`), and a quarter of a GiB of libraries (docs/measured.md)."""
        shape = self.shape
        widest = max(shape.vocab, 2 * shape.ffn, shape.attention.matmul_params(shape.hidden) // shape.hidden)
        return 3 * 2.0 * shape.hidden * widest + (1 << 28)

    def export_bytes(self) -> float:
        """Of the trained checkpoint in Hugging Face's format."""
        head = self.shape.vocab * self.shape.hidden if self.fields.has_score else 0
        return (total_parameters(self.shape) - head) * float(self.itemsize)

    def _pass(self, factor: float) -> float:
        """Matrix products of an update on the slowest stage: `factor` forward passes."""
        cluster, layout = self.config.cluster, self.layout
        precision = self.config.precision
        emulated = precision.emulate_fp8  # its products are taken in fp32
        peak = cluster.gpu_fp8_tflops if precision.fp8 and not emulated else cluster.gpu_bf16_tflops
        if self.itemsize == 4 or emulated:
            peak /= 16  # without tensor cores (H100 SXM: 67 of 989)
        tokens = self.job.tokens_per_update / layout.dp / (layout.tp * layout.cp)
        return factor * max(self.stage_flops()) * tokens / (peak * 1e12 * self.config.plan.mfu)

    def stage_flops(self) -> list[float]:
        """Forward FLOPs of a token on each stage."""
        shape, total = self.shape, [0.0] * self.layout.pp
        attention = 2 * shape.attention.matmul_params(shape.hidden)
        attention += shape.attention.flops_per_context_token() * self.context
        counts, layer = self.layout.chunk_layers(shape.num_layers), 0
        for chunk, count in enumerate(counts):
            for _ in range(count):
                width = float(shape.ffn)
                if shape.experts is not None and layer >= shape.experts.first_dense:
                    width = shape.experts.ffn * (shape.experts.top_k + shape.experts.num_shared)
                total[chunk % self.layout.pp] += attention + 6 * shape.hidden * width
                layer += 1
        total[-1] += 0 if self.fields.has_score else 2 * shape.vocab * shape.hidden
        return total

    def _layers(self) -> int:
        """Decoder layers of the stage that has most."""
        counts = self.layout.chunk_layers(self.shape.num_layers)
        return max(sum(counts[stage :: self.layout.pp]) for stage in range(self.layout.pp))

    def _tokens(self) -> float:
        """Of an update, on one rank's data and context-parallel part."""
        return self.job.tokens_per_update / self.layout.dp / self.layout.cp

    def _link(self, ranks: int) -> float:
        """Bytes a second between ranks that stand next to each other, so many of them."""
        cluster = self.config.cluster
        rate = cluster.node_gb_per_s if ranks <= cluster.gpus_per_node else cluster.network_gb_per_s
        return rate * 1e9 * self.config.plan.network_efficiency

    def _traffic(self, passes: float) -> dict[str, tuple[float, float]]:
        """(bytes, bytes a second) of each kind of collective, of so many passes and one reduction."""
        layout, ep_ranks = self.layout, self.layout.ep * self.layout.etp
        # With sequence parallelism the backward pass gathers the inputs of two linears a layer once more.
        tensor = (passes + 0.5 if passes > 1 else passes) * self._layers() * self._tensor_parallel()
        return {
            "tensor parallel": (tensor, self._link(layout.tp)),
            "context parallel": (passes * self._layers() * self._context_parallel(), self._link(layout.tp * layout.cp)),
            "expert parallel": (passes * self._layers() * self._expert_parallel(), self._link(ep_ranks)),
            "pipeline": (min(passes, 2.0) * self._pipeline(), self._link(layout.world_size)),
            "data parallel": (self._data_parallel(), self._link(layout.per_stage)),
        }

    def _tensor_parallel(self) -> float:
        """Bytes of a layer's forward pass: two gathers and two scatters of the sequence."""
        tp = self.layout.tp
        return 4 * self._tokens() * self.shape.hidden * self.itemsize * (tp - 1) / tp

    def _context_parallel(self) -> float:
        """Keys and values of all ranks are gathered."""
        cp, tp, attention = self.layout.cp, self.layout.tp, self.shape.attention
        if isinstance(attention, LatentAttention):
            width = attention.num_heads * (attention.nope_dim + attention.rope_dim + attention.value_dim)
        else:
            width = 2 * attention.head_dim * attention.num_kv_heads
        return self._tokens() * (cp - 1) * width / tp * self.itemsize

    def _expert_parallel(self) -> float:
        """Each token goes to its experts and comes back; DeepEP sends it once to each machine."""
        ep = self.layout.ep
        if not self.fields.moe_layers:
            return 0.0
        copies = self.fields["num_experts_per_tok"]
        if self.config.parallel.dispatcher is Dispatcher.flex and ep > self.config.cluster.gpus_per_node:
            copies = min(copies, self.fields["topk_group"])
        tokens = self._tokens() / self.layout.tp
        return 2 * tokens * copies * self.shape.hidden * self.itemsize * (ep - 1) / ep

    def _pipeline(self) -> float:
        """What a stage hands on."""
        chunks = self.layout.vpp if self.layout.pp > 1 else 0
        return chunks * self._tokens() / self.layout.tp * self.shape.hidden * self.itemsize

    def _data_parallel(self) -> float:
        """Gradients are reduced in fp32, parameters gathered; what is hidden behind compute does not count."""
        layout, parallel = self.layout, self.config.parallel
        shown = 0 if parallel.overlap_grad_reduce else 4
        shown += 0 if parallel.overlap_param_gather else self.itemsize
        dense, experts = layout.dp * layout.cp, layout.expert_dp
        return max(
            shown * (held.dense * (dense - 1) / dense + held.experts * (experts - 1) / experts) for held in self.held
        )

    def _optimizer(self) -> float:
        """Master weights, moments and gradients are read and written once."""
        layout = self.layout
        share = max(held.dense / (layout.dp * layout.cp) + held.experts / layout.expert_dp for held in self.held)
        return 30 * share / (self.config.cluster.gpu_memory_gb_per_s * 1e9 * 0.5)
