"""Log-probabilities and entropies from logits that are cut along the vocabulary, or from what they are made of.

Shape suffixes: T tokens, H hidden size, V this rank's columns of the vocabulary, N the columns of V that are real
tokens, 1 a kept axis of size one. Ranks of a group hold consecutive blocks: rank r holds the token ids
[r * V, (r + 1) * V).

No function here holds more than `chunk_tokens` rows of the vocabulary in fp32 at a time, forward or backward: one such
chunk, one more where the logits are not fp32 or the temperature is not 1, one more for the entropy. What is kept for
the backward pass is the logits themselves, which the model's output layer made anyway, the targets and two numbers a
token; the softmax is computed again from them. `head_logprobs` does not even hold the logits: it makes them of the
hidden states a chunk at a time, and makes them again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_INNER_PARTS = 16  # the fp32 numbers of a chunk of `head_logprobs` are worked out in so many parts


class _Shard(NamedTuple):
    """Which part of the vocabulary stands here, and how it is read."""

    first_id: int  # token id of column 0
    num_real: int  # columns that are tokens; the rest is padding
    group: dist.ProcessGroup | None  # None: every column is here
    inverse_temperature: float
    chunk_tokens: int


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at the targets, differentiable with respect to the logits.

    Args:
        logits_TV: this rank's columns of the logits, [T, V], any floating dtype; finite.
        target_T: token ids over the whole vocabulary, [T], integers. Every rank of the group passes the same.
        group: the ranks the vocabulary is cut over; None means that all of it is here.
        temperature: divides the logits, > 0. Use the temperature the tokens were sampled with.
        chunk_tokens: tokens handled at a time; bounds the temporary memory, changes no result.
        vocab_size: the number of real tokens over the whole group. Columns from this id on are padding: they have
            probability zero and gradient zero. None: every column is real.

    Returns:
        [T], fp32 (fp64 for fp64 logits), the same on every rank. A target outside the vocabulary has probability zero,
        so its log-prob is -inf, and no gradient is defined for it.

    The gradient comes back in the dtype of the logits. It needs no communication: the incoming gradient is taken to be
    the same on every rank of the group, as it is where each of them computes the same loss.
    """
    shard = _shard(logits_TV, group, temperature, chunk_tokens, vocab_size)
    logprobs_T, _ = _VocabParallelLogprobs.apply(logits_TV, target_T, shard, False)
    return logprobs_T


def logprobs_and_entropy(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probs of `vocab_parallel_logprobs` and the entropy of each token's distribution, from one pass.

    Same arguments. Returns ([T], [T]): the log-probs are differentiable, the entropy (nats) is a metric and is not.
    """
    shard = _shard(logits_TV, group, temperature, chunk_tokens, vocab_size)
    return _VocabParallelLogprobs.apply(logits_TV, target_T, shard, True)


def head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of logits = hidden @ weight^T, of which no more than `chunk_tokens` rows are ever held.

    `weight_VH` is this rank's rows of the output table. Other arguments and the result as in `logprobs_and_entropy`;
    differentiable with respect to hidden states and weight. The gradient of the hidden states is this rank's part of a
    sum over the group. A pass holds, beside the gradient of the weight, the logits of one chunk in the dtype of the
    hidden states and a sixteenth of them in fp32, three times at most.
    """
    shard = _shard(hidden_TH.new_empty(0, weight_VH.shape[0]), group, temperature, chunk_tokens, vocab_size)
    return _HeadLogprobs.apply(hidden_TH, weight_VH, target_T, shard)


@torch.no_grad()
def vocab_parallel_entropy(
    logits_TV: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    vocab_size: int | None = None,
) -> Tensor:
    """The entropy of softmax(logits / temperature) in nats, [T]. A metric: it carries no gradient.

    Arguments as in `vocab_parallel_logprobs`. H = log sum_v exp(y_v) - sum_v p_v y_v, with y = x - max(x).
    """
    shard = _shard(logits_TV, group, temperature, chunk_tokens, vocab_size)
    any_target_T = torch.zeros(logits_TV.shape[0], dtype=torch.long, device=logits_TV.device)
    return _forward(logits_TV, any_target_T, shard, with_entropy=True).entropy_T


class _Forward(NamedTuple):
    """Of the whole vocabulary: softmax is exp(x - max) / sum. The entropy is empty where it is not asked for."""

    max_T: Tensor
    sum_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV: Tensor, target_T: Tensor, shard: _Shard, with_entropy: bool):
        result = _forward(logits_TV, target_T, shard, with_entropy)
        ctx.save_for_backward(logits_TV, target_T, result.max_T, result.sum_T)
        ctx.shard = shard
        ctx.mark_non_differentiable(result.entropy_T)
        return result.logprobs_T, result.entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor, _entropy_grad_T: Tensor | None):
        return _backward(grad_T, *ctx.saved_tensors, ctx.shard), None, None, None


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, shard: _Shard):
        inner = shard._replace(chunk_tokens=max(1, shard.chunk_tokens // _INNER_PARTS))
        parts = list(_parts(hidden_TH.shape[0], shard.chunk_tokens))
        results, memory = [], _logits_memory(hidden_TH, weight_VH, shard)
        for part in parts:
            logits_TV = torch.mm(hidden_TH[part], weight_VH.T, out=memory[: part.stop - part.start])
            results.append(_forward(logits_TV, target_T[part], inner, with_entropy=True))
        max_T, sum_T, logprobs_T, entropy_T = (torch.cat(values) for values in zip(*results, strict=True))
        # A single chunk is kept, and becomes its own gradient: making it again would save nothing.
        kept = memory if len(parts) == 1 else None
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, max_T, sum_T, kept)
        ctx.shard, ctx.inner = shard, inner
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor, _entropy_grad_T: Tensor | None):
        hidden_TH, weight_VH, target_T, max_T, sum_T, kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        # Many chunks are summed: in 16 bits the small ones would be lost.
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_VH = torch.zeros_like(weight_VH, dtype=wide) if needs_weight else None
        memory = _logits_memory(hidden_TH, weight_VH, ctx.shard) if kept is None else kept
        for part in _parts(hidden_TH.shape[0], ctx.shard.chunk_tokens):
            logits_TV = memory[: part.stop - part.start]
            if kept is None:
                torch.mm(hidden_TH[part], weight_VH.T, out=logits_TV)
            _backward(grad_T[part], logits_TV, target_T[part], max_T[part], sum_T[part], ctx.inner, in_place=True)
            if grad_TH is not None:
                torch.mm(logits_TV, weight_VH, out=grad_TH[part])
            if grad_VH is not None:
                grad_VH += logits_TV.T @ hidden_TH[part]
        return grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), None, None


def _logits_memory(hidden_TH: Tensor, weight_VH: Tensor, shard: _Shard) -> Tensor:
    """Memory for the logits of one chunk, used for all of them."""
    return hidden_TH.new_empty(min(hidden_TH.shape[0], shard.chunk_tokens), weight_VH.shape[0])


def _parts(num_tokens: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` tokens; one empty slice for no tokens, so that every rank of a group takes part."""
    for start in range(0, max(num_tokens, 1), step):
        yield slice(start, min(start + step, num_tokens))


def _forward(logits_TV: Tensor, target_T: Tensor, shard: _Shard, with_entropy: bool) -> _Forward:
    num_tokens = logits_TV.shape[0]
    column_T = target_T - shard.first_id
    here_T = (column_T >= 0) & (column_T < shard.num_real)
    # Few numbers a token, so that the group exchanges two small tensors whatever the vocabulary: the maximum and the
    # target's logit; the sum of exp(x - max) and, for the entropy, of exp(x - max) (x - max).
    tops_2T = logits_TV.new_full((2, num_tokens), -torch.inf, dtype=_compute_dtype(logits_TV))
    sums_KT = torch.zeros_like(tops_2T[: 2 if with_entropy else 1])
    if shard.num_real > 0:
        scratch = _Scratch(logits_TV, shard)
        for part, scaled_TN in scratch.chunks():
            max_T1 = scaled_TN.amax(-1, keepdim=True)
            at_target_T = scaled_TN.gather(1, column_T[part].clamp(0, shard.num_real - 1).unsqueeze(1)).squeeze(1)
            tops_2T[0, part] = max_T1.squeeze(1)
            tops_2T[1, part] = at_target_T.masked_fill(~here_T[part], -torch.inf)
            shifted_TN = torch.sub(scaled_TN, max_T1, out=scratch.memory("shifted", part))
            exp_TN = torch.exp(shifted_TN, out=scratch.memory("exp", part) if with_entropy else shifted_TN)
            sums_KT[0, part] = exp_TN.sum(-1)
            if with_entropy:
                sums_KT[1, part] = shifted_TN.mul_(exp_TN).sum(-1)
    if shard.group is not None:
        _combine(tops_2T, sums_KT, shard.group)
    max_T, sum_T, log_sum_T = tops_2T[0], sums_KT[0], sums_KT[0].log()
    entropy_T = log_sum_T - sums_KT[1] / sum_T if with_entropy else sum_T.new_empty(0)
    return _Forward(max_T, sum_T, tops_2T[1] - max_T - log_sum_T, entropy_T)


def _combine(tops_2T: Tensor, sums_KT: Tensor, group: dist.ProcessGroup) -> None:
    """From each rank's numbers to those of the whole vocabulary, in place: one maximum, one sum over the group."""
    own_max_T = tops_2T[0].clone()
    dist.all_reduce(tops_2T, op=dist.ReduceOp.MAX, group=group)  # the target's logit is -inf on all but its owner
    behind_T = own_max_T - tops_2T[0]  # -inf on a rank without real columns, whose sums are 0
    if len(sums_KT) == 2:
        sums_KT[1] += torch.where(sums_KT[0] > 0, behind_T * sums_KT[0], 0)
    sums_KT *= behind_T.exp()
    dist.all_reduce(sums_KT, group=group)


def _backward(
    grad_T: Tensor,
    logits_TV: Tensor,
    target_T: Tensor,
    max_T: Tensor,
    sum_T: Tensor,
    shard: _Shard,
    *,
    in_place: bool = False,
) -> Tensor:
    """d logprob / d logit_v = (1[v is the target] - p_v) / temperature, a chunk at a time; in place of the logits where
    asked."""
    grad_TV = logits_TV if in_place else torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    grad_TV[:, shard.num_real :] = 0
    if shard.num_real == 0:
        return grad_TV
    column_T = target_T - shard.first_id
    here_T = (column_T >= 0) & (column_T < shard.num_real)
    scale_T = (grad_T * shard.inverse_temperature).to(sum_T.dtype)
    at_target_T = torch.where(here_T, scale_T, 0)
    softmax_scale_T = -scale_T / sum_T
    scratch = _Scratch(logits_TV, shard)
    for part, scaled_TN in scratch.chunks():
        # Where the dtypes agree, the gradient itself is the scratch memory.
        agree = grad_TV.dtype == scaled_TN.dtype
        out_TN = grad_TV[part, : shard.num_real] if agree else scratch.memory("gradient", part)
        torch.sub(scaled_TN, max_T[part].unsqueeze(1), out=out_TN).exp_().mul_(softmax_scale_T[part].unsqueeze(1))
        index_T1 = column_T[part].clamp(0, shard.num_real - 1).unsqueeze(1)
        out_TN.scatter_add_(1, index_T1, at_target_T[part].unsqueeze(1))
        if not agree:
            grad_TV[part, : shard.num_real] = out_TN
    return grad_TV


class _Scratch:
    """Temporary memory for one chunk under each name, allocated once for a pass."""

    def __init__(self, logits_TV: Tensor, shard: _Shard) -> None:
        self._logits_TN = logits_TV[:, : shard.num_real]
        self._shard = shard
        self._dtype = _compute_dtype(logits_TV)
        self._memory: dict[str, Tensor] = {}

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of tokens, logits / temperature of them in the dtype of the computation)."""
        num_tokens, step = self._logits_TN.shape[0], self._shard.chunk_tokens
        as_they_are = self._logits_TN.dtype == self._dtype and self._shard.inverse_temperature == 1.0
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            chunk_TN = self._logits_TN[part]
            if not as_they_are:
                chunk_TN = self.memory("scaled", part).copy_(chunk_TN).mul_(self._shard.inverse_temperature)
            yield part, chunk_TN

    def memory(self, name: str, part: slice) -> Tensor:
        """Memory for a chunk; the same at every call with this name."""
        if name not in self._memory:
            num_rows = min(self._shard.chunk_tokens, self._logits_TN.shape[0])
            self._memory[name] = self._logits_TN.new_empty((num_rows, self._shard.num_real), dtype=self._dtype)
        return self._memory[name][: part.stop - part.start]


def _compute_dtype(logits_TV: Tensor) -> torch.dtype:
    return torch.float64 if logits_TV.dtype == torch.float64 else torch.float32


def _shard(
    logits_TV: Tensor,
    group: dist.ProcessGroup | None,
    temperature: float,
    chunk_tokens: int,
    vocab_size: int | None,
) -> _Shard:
    assert logits_TV.dim() == 2, f"logits must be [tokens, vocabulary], got {tuple(logits_TV.shape)}"
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; must be > 0; use 1 for the log-probs of a greedy sample")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}; must be at least 1; 1024 suits most models")
    num_columns = logits_TV.shape[1]
    size = 1 if group is None else dist.get_world_size(group)
    first_id = 0 if group is None else dist.get_rank(group) * num_columns
    if vocab_size is None:
        vocab_size = num_columns * size
    if not 1 <= vocab_size <= num_columns * size:
        raise ValueError(
            f"vocab_size: got {vocab_size}; must be from 1 to {num_columns * size}, the columns of {size} rank(s); "
            "pass the vocabulary of the model's config.json"
        )
    num_real = min(max(vocab_size - first_id, 0), num_columns)
    return _Shard(first_id, num_real, group if size > 1 else None, 1.0 / temperature, chunk_tokens)
