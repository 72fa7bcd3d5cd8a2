"""The model being trained, spread over the ranks: log-probs, gradients, updates, its reference copy, its export.

Every method is collective: all ranks call it with the same arguments, taken from the same record batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from r1mega.algo.logprobs import head_logprobs
from r1mega.algo.packing import Plan, plan_batch
from r1mega.algo.policy_loss import merge_metrics
from r1mega.models import fp8
from r1mega.models.build import build_chunks
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import Slot
from r1mega.models.router import expert_load, replay_agreement
from r1mega.models.shard import ShardedModel, TensorSource
from r1mega.parallel.collectives import gather, spread_over, sum_once
from r1mega.parallel.groups import Groups
from r1mega.train import checkpoint
from r1mega.train.batch import Cut, MicroBatch, PackItem, make_micro_batch
from r1mega.train.offload import Offload
from r1mega.train.optimizer import AdamSettings, full_gradients, make_optimizer, wrap
from r1mega.train.routes import moe_layers

# (log-probs [R], entropy [R], micro-batch) -> (loss, sums to report). Names that end in `_max` are reduced by maximum.
Loss = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]

_CHECKSUM_BYTES = 1 << 26  # digested at once, in eight times the memory


class MegatronPolicy:
    """A Megatron model with its optimizer on this rank's part of the layout."""

    def __init__(
        self,
        fields: HfFields,
        groups: Groups,
        options: ModelOptions,
        adam: AdamSettings | None,
        *,
        temperature: float = 1.0,
    ) -> None:
        """Without `adam` it can be asked but not trained, and holds no gradients."""
        self.fields, self.groups = fields, groups
        self.temperature = temperature
        self.chunks = build_chunks(fields, groups, options)
        self.sharded = ShardedModel(self.chunks, fields, groups, options.layer_spec)
        self._wrapped = wrap(self.chunks, groups, adam, self._note_expert_load) if adam else self.chunks
        self._adam = adam
        self.optimizer: MegatronOptimizer | None = None  # from `load` on
        self.trains_trunk_further = True  # whether the loss two tokens ahead also reaches the model below
        self.logprob_chunk_tokens = 1024  # tokens whose logits are held at once
        self._mtp_weight = 0.0
        self._align = fp8.TOKENS if options.fp8 else 1
        self._expert_load: dict[str, float] = {}
        self._moe_layers = moe_layers(fields, groups.layout, groups.coordinate.pp)
        self._replays = False
        self._offload: Offload | None = None
        self._copies: dict[str, list[torch.Tensor]] = {}
        self._forward_backward = get_forward_backward_func()

    def load(self, source: TensorSource) -> None:
        """Fill the parameters from a source of Hugging Face tensors, and take up the optimizer's state on them."""
        self.sharded.fill(source)
        if self._adam:
            self.optimizer = make_optimizer(self._wrapped, self._adam)

    def load_distributed(self, path: Path, *, trains: bool = True) -> None:
        """Fill the parameters from a distributed checkpoint that `save` or a conversion wrote. Instead of `load`."""
        self.sharded.clear_padding()
        checkpoint.load_weights(self, path)
        if trains:
            self.optimizer = make_optimizer(self._wrapped, self._adam)

    def restore(self, path: Path, copies: Sequence[str] = ()) -> None:
        """Fill weights, optimizer and the kept copies named from a checkpoint that `save` wrote. Instead of `load`."""
        self.optimizer = make_optimizer(self._wrapped, self._adam)
        checkpoint.load(self, path, copies)

    def save(self, path: Path, *, asynchronous: bool = False) -> AsyncRequest | None:
        """Write weights, optimizer and kept copies into an empty directory; see `train.checkpoint.save`."""
        self.take_back()
        self.settle()
        return checkpoint.save(self, path, asynchronous=asynchronous)

    def plan(self, sequences: Sequence[PackItem], max_tokens: int) -> Plan:
        """Which sequences go into which micro-batch of which data-parallel part; see `algo.packing.plan_batch`."""
        return self.plan_lengths([len(sequence.tokens) for sequence in sequences], max_tokens)

    def plan_lengths(self, lengths: Sequence[int], max_tokens: int) -> Plan:
        """`plan` of sequences of so many tokens."""
        layout = self.groups.layout
        return plan_batch(
            lengths,
            dp=layout.dp,
            max_tokens=max_tokens,
            multiple_of_count=layout.pp if layout.vpp > 1 else 1,  # Megatron's interleaved schedule asks for it
        )

    def logprobs(
        self, sequences: Sequence[PackItem], plan: Plan, *, temperature: float | None = None
    ) -> list[torch.Tensor]:
        """Log-probs of each sequence's response tokens, fp32 on the CPU, on every rank; at the policy's temperature, or
        at the one given."""
        found: dict[int, torch.Tensor] = {}
        own = self.temperature

        def collect(logprobs_R: torch.Tensor, _entropy_R: torch.Tensor, batch: MicroBatch):
            found.update(zip(batch.samples, logprobs_R.split(batch.num_responses), strict=True))
            return logprobs_R.sum(), {}

        self.temperature = own if temperature is None else temperature
        try:
            with torch.no_grad():
                self._run(sequences, plan, collect, forward_only=True)
        finally:
            self.temperature = own
        return self.collect_samples(sequences, found)

    def collect_samples(self, sequences: Sequence[PackItem], mine: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Numbers of each sequence's response tokens, which a loss saw on the rank that computed it, on every rank."""
        sizes = [sequence.num_response for sequence in sequences]
        flat = torch.zeros(sum(sizes))
        parts = flat.split(sizes)
        # Exactly one rank speaks for each sequence: adding the zeros of the others changes no bit.
        if self.groups.speaks_for_loss:
            for sample, values in mine.items():
                parts[sample].copy_(values)
        if self.groups.layout.world_size > 1:
            dist.all_reduce(flat, group=self.groups.control)
        return list(parts)

    def forward_backward(
        self, sequences: Sequence[PackItem], plan: Plan, loss: Loss, *, mtp_weight: float = 0.0
    ) -> dict[str, float]:
        """Accumulate the gradient of one update's loss; returns its reported sums over all micro-batches and ranks.

        The tokens are looked at of those sequences alone that this rank's part of the plan names.

        `mtp_weight` times the summed cross-entropy of the multi-token-prediction layer joins the loss; 0 leaves that
        layer out of the computation.
        """
        self.take_back()
        for wrapped in self._wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        last = self.chunks[-1]
        self._mtp_weight = mtp_weight
        self._replays = any(sequence.routed_experts is not None for sequence in sequences)
        last.looks_further, last.trains_trunk = mtp_weight > 0, self.trains_trunk_further
        try:
            reports = self._run(sequences, plan, loss, forward_only=False)
        finally:
            self._mtp_weight = 0.0
            last.looks_further = False
        return self._reduce(reports)

    def optimizer_step(self, lr: float) -> float:
        """Clip the gradient, update the weights at this learning rate; returns the gradient's norm before clipping.

        Raises ArithmeticError on a gradient that is not finite: the weights are then as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ok, grad_norm, _ = self.optimizer.step()
        if not ok or not torch.isfinite(torch.tensor(grad_norm)):
            raise ArithmeticError(
                f"gradient norm: got {grad_norm}; must be finite; lower optim.lr or look at the batch's rewards"
            )
        return float(grad_norm)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(hf_name, gradient) of every parameter, after `forward_backward` and before `optimizer_step`."""
        whole = full_gradients(self._wrapped)
        for _slot, _shard, parameter in self.sharded.local:
            if parameter in whole:
                parameter.full_grad = whole[parameter]
        yield from self.sharded.gather_gradients()

    def hand_over(self, *, keeps_weights: bool = False) -> int:
        """Leave the accelerator's memory to the engine: weights, gradients and optimizer state go to host memory; the
        weights stay where `keeps_weights` and they are not there yet.

        Returns the bytes freed. They come back by themselves when they are needed (`take_back`).
        """
        if self._offload is None:
            self._offload = Offload(self._wrapped, self.optimizer)
        return self._offload.move_out(keeps_weights=keeps_weights)

    def take_back(self, *, only_weights: bool = False) -> None:
        """Bring back what `hand_over` moved, or of it the weights."""
        if self._offload is not None:
            self._offload.move_back(only_weights=only_weights)

    def settle(self) -> None:
        """Have the weights here and up to date before they are read: back from host memory, and gathered where the last
        optimizer step left that to the next forward pass."""
        self.take_back(only_weights=True)
        if self._adam and self._adam.overlap_param_gather:
            for wrapped in self._wrapped:
                wrapped.disable_forward_pre_hook(param_sync=True)
                wrapped.enable_forward_pre_hook()

    def export_hf(self, *, wanted: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """(hf_name, tensor) of the whole model in the table's order; see ShardedModel.gather."""
        self.settle()
        yield from self.sharded.gather(wanted=wanted)

    def shards(self) -> Sequence[tuple[Slot, int, torch.Tensor]]:
        """(slot of the table, which shard of it, parameter) of all that this rank holds, up to date."""
        self.settle()
        return self.sharded.local

    def close(self) -> None:
        """Let go of the model, for process groups to end before the process does. The policy is of no more use.

        Megatron's gradient hooks hold the model, and with it the groups and their threads, in a circle that runs
        through autograd's nodes, where Python's collector does not see it.
        """
        for wrapped in self._wrapped:
            wrapped.__dict__.clear()

    def copies(self) -> list[str]:
        """Names of the kept copies."""
        return sorted(self._copies)

    def digest(self) -> str:
        """A digest of all weights, bit by bit: the same on every rank, and for every run at this layout that made them.

        Each rank digests its own shards on its device; copies of a shard are counted once.
        """
        self.settle()
        mine = {
            (slot.name, shard): checksum(parameter)
            for slot, shard, parameter in self.sharded.local
            if self.sharded.placement.owner(slot, shard) == self.groups.rank and not slot.is_copy
        }
        whole = sorted(item for part in gather(mine, self.groups.control) for item in part.items())
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]

    @torch.no_grad()
    def keep_copy(self, name: str) -> None:
        """Keep the present weights under a name (e.g. "reference"), in host memory."""
        self.settle()
        tensors = [parameter for _, _, parameter in self.sharded.local]
        if name in self._copies:
            for kept, parameter in zip(self._copies[name], tensors, strict=True):
                kept.copy_(parameter)
        else:
            self._copies[name] = [parameter.detach().to("cpu", copy=True) for parameter in tensors]

    @contextmanager
    def weights(self, name: str) -> Iterator[None]:
        """Compute with the kept copy `name` inside the block. No gradient may be taken in it."""
        tensors = [parameter for _, _, parameter in self.sharded.local]
        self.settle()
        present = [parameter.data for parameter in tensors]
        try:
            for parameter, kept in zip(tensors, self._copies[name], strict=True):
                parameter.data = kept.to(self.groups.device)
            yield
        finally:
            for parameter, data in zip(tensors, present, strict=True):
                parameter.data = data

    def _run(self, sequences: Sequence[PackItem], plan: Plan, loss: Loss, *, forward_only: bool) -> list[dict]:
        self.take_back(only_weights=forward_only)
        layout, at = self.groups.layout, self.groups.coordinate
        samples = plan.chunks[at.dp]
        cut = Cut(layout.tp, layout.cp, at.cp, self.groups.cp, self._align)
        # The stages of an interleaved pipeline exchange tensors of one shape (see models.hf_config).
        length = max(cut.pack_length(len(sequences[i].tokens) for i in chosen) for chosen in samples)
        batches = [
            make_micro_batch(
                sequences,
                chosen,
                cut=cut,
                device=self.groups.device,
                length=length if layout.vpp > 1 else 0,
                balance_weight=1.0 / len(sequences),
                moe_layers=self._moe_layers,
            )
            for chosen in samples
        ]

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module):
            batch = next(iterator)
            hidden = model(batch.tokens_1T, batch.positions_1T, None, packed_seq_params=batch.packed)

            def loss_of(hidden: torch.Tensor):
                value, report = self._loss(hidden, batch, loss)
                return value, torch.zeros((), dtype=torch.int), report

            return hidden, loss_of

        reports = self._forward_backward(
            forward_step_func=forward_step,
            # Each chunk of an interleaved pipeline goes through all micro-batches.
            data_iterator=[iter(batches) for _ in self._wrapped],
            model=self._wrapped,
            num_microbatches=len(batches),
            # Without interleaving shapes travel with each micro-batch, and this only has to be there.
            seq_length=length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reports

    def _loss(self, hidden: torch.Tensor, batch: MicroBatch, loss: Loss) -> tuple[torch.Tensor, dict]:
        if not batch.samples:
            return hidden.sum() * 0.0, {}  # a micro-batch of padding, so that all ranks run equally many
        last = self.chunks[-1]
        found = self._score(*last.head(hidden, batch.rows_L), batch.targets_L, self.temperature)
        if batch.select_L is not None:
            found = (spread_over(values, batch.select_L, len(batch.sequence_R), self.groups.cp) for values in found)
        logprobs_R, entropy_R = found
        value, report = loss(logprobs_R, entropy_R, batch)
        if self._mtp_weight:
            head = last.head(hidden, batch.further_rows_M, further=True)
            further_M, _ = self._score(*head, batch.further_targets_M, 1.0)
            further = -self._mtp_weight * sum_once(further_M.sum(), self.groups.cp)
            value, report = value + further, report | {"mtp_loss": further.detach()}
        return value, report

    def _score(self, hidden_LH: torch.Tensor, weight_VH: torch.Tensor, targets_L: torch.Tensor, temperature: float):
        """Log-probs and entropies [L] of the targets; the weight holds this tensor rank's part of the vocabulary."""
        return head_logprobs(
            hidden_LH,
            weight_VH,
            targets_L,
            group=self.groups.tp if self.groups.layout.tp > 1 else None,
            temperature=temperature,
            chunk_tokens=self.logprob_chunk_tokens,
            vocab_size=self.fields["vocab_size"],
        )

    def _note_expert_load(self) -> None:
        self._expert_load = expert_load(self.chunks, self.groups.stage)
        if self._replays:
            self._expert_load |= replay_agreement(self.chunks, self.groups.stage)

    def _reduce(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums and maxima of the reports over micro-batches and the data-parallel ranks of the last stage,
        everywhere."""
        total: dict[str, float] = {}
        if self.groups.speaks_for_stage and self._expert_load:
            total |= self._expert_load
        if self.groups.speaks_for_loss:
            merged = merge_metrics(reports)
            if merged:
                # One wait for the device, however many numbers there are.
                values = torch.stack([value.float() for value in merged.values()]).tolist()
                total |= dict(zip(merged, values, strict=True))
        reduced: dict[str, float] = {}
        for part in gather(total, self.groups.control):
            _merge(reduced, part)
        return reduced


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit sum over the tensor's bytes, each place weighed by its own odd number: any changed bit changes it."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = 0
    for start in range(0, data.numel(), _CHECKSUM_BYTES):
        part = data[start : start + _CHECKSUM_BYTES]
        words = torch.nn.functional.pad(part, (0, -part.numel() % 4)).view(torch.int32).to(torch.int64)
        place = torch.arange(start // 4, start // 4 + words.numel(), device=words.device)
        total += int((words * (place * 0x9E3779B97F4A7C1 * 2 + 1)).sum())  # modulo 2^64
    return total % (1 << 64)


def _merge(total: dict[str, float], part: dict[str, float]) -> None:
    for name, value in part.items():
        if name in total:
            total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value
        else:
            total[name] = value
