"""Picking the next tokens of a batch, and knowing when a sequence has ended.

Shape suffixes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from r1mega.types import SamplingParams

# A tail begins this many tokens before the stop string could: special tokens of no text and the first, cut character.
_TAIL_SLACK = 4
_CUT_CHARACTER = "\ufffd"


class Decoder(Protocol):
    """What the stop strings need of a tokenizer."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def check_params(params: SamplingParams) -> None:
    """Raises ValueError on sampling parameters outside their range."""
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise ValueError(f"temperature: got {params.temperature}, must be 0 (greedy) or a positive number")
    if not 0 < params.top_p <= 1:
        raise ValueError(f"top_p: got {params.top_p}, must be in (0, 1]; 1 switches it off")
    if params.max_tokens < 1:
        raise ValueError(f"max_tokens: got {params.max_tokens}, must be at least 1")
    if params.seed is not None and params.seed < 0:
        raise ValueError(f"seed: got {params.seed}, must not be negative; leave it out for a fresh one")
    if "" in params.stop:
        raise ValueError("stop: an empty stop string would end every sequence at once; remove it")


def draw_uniforms(seed: int, position: int, num_samples: int, num_tokens: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for one request: float64 [num_samples, num_tokens].

    Keyed by the seed and the request's position (Philox, Salmon et al. 2011), so that what a sequence draws depends on
    neither the batch it runs in nor the length of its neighbours.
    """
    words = np.random.SeedSequence([seed, position]).generate_state(2, np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=words)).random((num_samples, num_tokens)))


def sample_tokens(
    logits_NV: torch.Tensor, temperature: float, top_p: float, uniforms_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, int64 [N], and its log-prob, float32 [N].

    The log-prob is log softmax(logits / temperature) at the token, over the whole vocabulary also where `top_p` cuts
    it, and log softmax(logits) where `temperature` is 0 (greedy; `uniforms_N` is not read then). Tokens come from the
    inverse of the cumulative distribution, one uniform number (float64) a row. Top-p keeps the smallest set of most
    probable tokens whose mass reaches `top_p` (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
    """
    logits_NV = logits_NV.float()
    if temperature == 0:
        tokens_N1 = logits_NV.argmax(-1, keepdim=True)
        logprobs_N1 = logits_NV.gather(-1, tokens_N1) - logits_NV.logsumexp(-1, keepdim=True)
        return tokens_N1.squeeze(-1), logprobs_N1.squeeze(-1)
    if temperature != 1:
        logits_NV = logits_NV / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    if top_p < 1:
        sorted_NV, order_NV = logprobs_NV.sort(dim=-1, descending=True, stable=True)
        probs_NV = sorted_NV.exp().double()
        # A token stays while the mass before it is below top_p, so the first always does.
        probs_NV = probs_NV.masked_fill(probs_NV.cumsum(-1) - probs_NV >= top_p, 0.0)
        tokens_N1 = order_NV.gather(-1, _inverse_cdf(probs_NV, uniforms_N))
    else:
        tokens_N1 = _inverse_cdf(logprobs_NV.exp(), uniforms_N)
    return tokens_N1.squeeze(-1), logprobs_NV.gather(-1, tokens_N1).squeeze(-1)


def _inverse_cdf(probs_NV: torch.Tensor, uniforms_N: torch.Tensor) -> torch.Tensor:
    """int64 [N, 1]: the first entry whose cumulated mass exceeds uniform * total, which is never one of no mass."""
    cumulated_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = uniforms_N.unsqueeze(-1) * cumulated_NV[:, -1:]
    # The clamp matters for NaN only, which has no place in the order; the caller refuses its log-prob.
    return torch.searchsorted(cumulated_NV, target_N1, right=True).clamp_(max=probs_NV.shape[-1] - 1)


class StopRule:
    """When a sequence has ended: a stop token, or a stop string that the last token completed.

    Tokens are looked up in tables of the vocabulary, so a step asks once for the whole batch. Text is decoded only for
    rows whose new token can end a stop string (`may_end_N`), and then only a tail as long as the string can be.
    """

    def __init__(
        self,
        vocab_size: int,
        stop_token_ids: Iterable[int],
        stop: Sequence[str],
        tokenizer: Decoder | None,
        device: torch.device,
    ) -> None:
        """Raises ValueError on stop strings without a tokenizer and on a stop token outside the vocabulary."""
        if stop and tokenizer is None:
            raise ValueError(
                f"stop: got {list(stop)}, but the engine has no tokenizer; give it one or use stop_token_ids"
            )
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        # A token of no text aside, each brings a byte at least, so a string of n bytes lies within the last n tokens.
        self.tail = max((len(text.encode()) for text in stop), default=0) + _TAIL_SLACK
        self._ends_V = torch.zeros(vocab_size, dtype=torch.bool)
        for token in stop_token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"stop_token_ids: got {token}, the model's vocabulary is 0..{vocab_size - 1}")
            self._ends_V[token] = True
        self._ends_V = self._ends_V.to(device)
        self._may_end_V = self._candidates(vocab_size).to(device) if stop else None

    @property
    def reads_text(self) -> bool:
        return self._may_end_V is not None

    def ends(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """bool [N]: the rows whose new token is a stop token."""
        return self._ends_V[tokens_N]

    def may_end(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """bool [N]: the rows whose text has to be read. Only where `reads_text`."""
        return self._may_end_V[tokens_N]

    def text_ends(self, tail: Sequence[int]) -> bool:
        """Whether a stop string stands in the text of a response's last `self.tail` tokens (fewer near its start)."""
        text = self._tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in self._stop)

    def _candidates(self, vocab_size: int) -> torch.Tensor:
        """bool [V]: tokens that can bring the last character of a stop string, or a part of its bytes."""
        last = {text[-1] for text in self._stop}
        if any(character.isspace() for character in last):
            # Decoders drop or move spaces at the edges of a text, so a token on its own does not show them.
            return torch.ones(vocab_size, dtype=torch.bool)
        last.add(_CUT_CHARACTER)
        known = min(len(self._tokenizer), vocab_size)
        texts = (self._tokenizer.decode([token], skip_special_tokens=False) for token in range(known))
        may_end = [not last.isdisjoint(text) for text in texts]
        return torch.tensor(may_end + [False] * (vocab_size - known), dtype=torch.bool)
