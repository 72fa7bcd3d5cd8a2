"""The policy's architecture with a row in the place of its output table: one score a sequence, at its last token.

Trained like the policy; or frozen, as reinforcement learning asks it, with its weights in host memory between uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from r1mega.algo.packing import Plan, plan_pairs
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_fields import HfFields
from r1mega.models.param_map import HfTensor
from r1mega.models.shard import TensorSource
from r1mega.models.tables.common import SCORE
from r1mega.parallel.collectives import spread_over
from r1mega.parallel.groups import Groups
from r1mega.train.batch import MicroBatch, PackItem
from r1mega.train.policy import MegatronPolicy

# (scores [S] of the micro-batch's sequences, micro-batch) -> (loss, sums to report).
ScoreLoss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class WithNewHead:
    """The tensors of `source`, with a score from `fresh` where the source has none: a base model begins so."""

    def __init__(self, source: TensorSource, fresh: TensorSource) -> None:
        self._source, self._fresh = source, fresh

    def holds(self, name: str) -> bool:
        """Whether the source has a tensor of that name."""
        return self._source.holds(name)

    def get(self, tensor: HfTensor) -> torch.Tensor:
        """The tensor, of the shape asked for. Raises ValueError where it is absent or misshapen."""
        is_new = tensor.name == SCORE and not self._source.holds(SCORE)
        return (self._fresh if is_new else self._source).get(tensor)


class MegatronRewardModel(MegatronPolicy):
    """A policy whose loss is a function of scores (ScoreLoss) instead of log-probs. `fields` must have a score."""

    def plan_pairs(self, sequences: Sequence[PackItem], max_tokens: int) -> Plan:
        """Like `plan`, of sequences that come in pairs, each pair in one micro-batch."""
        layout = self.groups.layout
        return plan_pairs(
            [len(sequence.tokens) for sequence in sequences],
            dp=layout.dp,
            max_tokens=max_tokens,
            multiple_of_count=layout.pp if layout.vpp > 1 else 1,
        )

    def scores(self, sequences: Sequence[PackItem], plan: Plan) -> list[float]:
        """The score of each sequence, to the bit the same on every rank. Collective."""
        found: dict[int, float] = {}

        def collect(scores_S: torch.Tensor, batch: MicroBatch):
            found.update(zip(batch.samples, scores_S.tolist(), strict=True))
            return scores_S.sum(), {}

        with torch.no_grad():
            self._run(sequences, plan, collect, forward_only=True)
        # Exactly one rank speaks for each sequence: adding the zeros of the others changes no bit.
        flat = torch.zeros(len(sequences), dtype=torch.float64)
        if self.groups.speaks_for_loss:
            for sample, score in found.items():
                flat[sample] = score
        if self.groups.layout.world_size > 1:
            dist.all_reduce(flat, group=self.groups.control)
        return flat.tolist()

    def _loss(self, hidden: torch.Tensor, batch: MicroBatch, loss: ScoreLoss) -> tuple[torch.Tensor, dict]:
        if not batch.samples:
            return hidden.sum() * 0.0, {}  # as in the policy
        scores_S = self.chunks[-1].score(hidden, batch.end_rows_E)
        if batch.select_E is not None:
            scores_S = spread_over(scores_S, batch.select_E, len(batch.samples), self.groups.cp)
        return loss(scores_S, batch)


class FrozenRewardModel(MegatronRewardModel):
    """A reward model to be asked alone. On a GPU its weights are in host memory but inside `present`."""

    def __init__(self, fields: HfFields, groups: Groups, options: ModelOptions) -> None:
        super().__init__(fields, groups, options, None)
        self._kept: list[torch.Tensor] = []

    def load(self, source: TensorSource) -> None:
        """Fill the weights and put them away. Raises ValueError where one is absent or misshapen."""
        super().load(source)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        on_host = [parameter.data.cpu() for parameter in self._parameters()]
        is_cuda = self.groups.device.type == "cuda"
        self._kept = [tensor.pin_memory() if is_cuda else tensor for tensor in on_host]
        self._put_away()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the weights on the device inside the block."""
        for parameter, kept in zip(self._parameters(), self._kept, strict=True):
            parameter.data = kept.to(self.groups.device, non_blocking=True)
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter in self._parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.groups.device)
        torch.cuda.empty_cache()  # what torch keeps for itself no other process can have

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]
