"""The keys and values of a batch whose rows come and go, and the attention that reads them.

The models run with `attend` as their attention (transformers' AttentionInterface), which is given the keys and values
of the new tokens only and keeps the rest itself. Three things follow. Rows of unequal length stand left-aligned, so a
prompt needs no padding and a batch of equal lengths no mask. Storage is written in place instead of concatenated at
every step. And for multi-head latent attention the latent of a token is expanded once, where transformers' own cache
expands all of them again at every step (at the price of keeping full keys and values).

Shape suffixes: Y layers, N active rows, R rows held, H key/value heads, G query heads per key/value head, S new tokens,
T tokens held, D head dim (values may have another than keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

ATTENTION = "r1mega_kv_cache"
# Room for this many new tokens at first, then half as much again each time: most sequences end long before the longest
# allowed, whose memory is not taken until one gets there.
_FIRST_TOKENS = 256
_GROWTH = 1.5


@dataclass(frozen=True)
class PromptCache:
    """Keys [Y, H, T, D] and values [Y, H, T, D'] of one prompt."""

    keys: torch.Tensor
    values: torch.Tensor


class PrefillCache:
    """Collects keys and values of right-padded prompts while the model reads them."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def append(self, key_NHSD: torch.Tensor, value_NHSD: torch.Tensor) -> None:
        self._keys.append(key_NHSD)
        self._values.append(value_NHSD)

    def split(self, lengths: list[int]) -> list[PromptCache]:
        """One PromptCache per prompt, its padding left out; each owns its memory."""
        keys, values = torch.stack(self._keys), torch.stack(self._values)
        return [
            PromptCache(keys[:, row, :, :length].clone(), values[:, row, :, :length].clone())
            for row, length in enumerate(lengths)
        ]


class DecodeCache:
    """Keys and values of up to `max_rows` sequences, the active ones in rows 0..N-1, each left-aligned.

    One decoding step is: `begin_step`, then the model's forward (which calls `append` per layer).
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._keys: torch.Tensor | None = None  # [Y, R, H, T, D]
        self._values: torch.Tensor | None = None
        self._mask_N11T: torch.Tensor | None = None
        self._now: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._flat_NH: torch.Tensor | None = None

    def fill(self, first_row: int, num_rows: int, prompt: PromptCache) -> None:
        """Put one prompt into `num_rows` rows from `first_row` on."""
        tokens = prompt.keys.shape[2]
        if self._keys is None or tokens > self._keys.shape[3]:
            self._grow(min(tokens + _FIRST_TOKENS, self._max_tokens), prompt)
        rows = slice(first_row, first_row + num_rows)
        self._keys[:, rows, :, :tokens] = prompt.keys.unsqueeze(1)
        self._values[:, rows, :, :tokens] = prompt.values.unsqueeze(1)

    def move(self, sources: list[int], targets: list[int], tokens: int) -> None:
        """Copy the first `tokens` tokens of rows `sources` to rows `targets`; the two lists share no row."""
        for store in (self._keys, self._values):
            for source, target in zip(sources, targets, strict=True):
                store[:, target, :, :tokens] = store[:, source, :, :tokens]

    def begin_step(self, num_rows: int, longest: int, lengths_N: torch.Tensor | None) -> None:
        """Make room for one more token in each of the first `num_rows` rows.

        `longest` is the number of tokens held by the longest of them; `lengths_N` the number in each, None where all
        are equal.
        """
        if longest + 1 > self._keys.shape[3]:
            self._grow(longest + 1)
        width = longest + 1
        keys, values = self._keys[:, :num_rows, :, :width], self._values[:, :num_rows, :, :width]
        self._now = list(zip(keys.unbind(0), values.unbind(0), strict=True))
        if lengths_N is None:
            self._mask_N11T = None
            self._flat_NH = None
            self._new = list(zip(keys[:, :, :, longest].unbind(0), values[:, :, :, longest].unbind(0), strict=True))
            return
        _, _, heads, capacity, _ = self._keys.shape
        device = lengths_N.device
        hidden = torch.arange(width, device=device) > lengths_N.unsqueeze(1)
        self._mask_N11T = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]
        # Row and head of a token in storage seen as [R * H * T, D].
        starts = torch.arange(num_rows * heads, device=device).view(num_rows, heads) * capacity
        self._flat_NH = (starts + lengths_N.unsqueeze(1)).view(-1)
        self._new = [
            (k.view(-1, k.shape[-1]), v.view(-1, v.shape[-1])) for k, v in zip(self._keys, self._values, strict=True)
        ]

    def append(self, layer: int, key_NH1D: torch.Tensor, value_NH1D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Write the new token of each row. Returns all keys and values of the active rows, and the mask or None."""
        for store, new in zip(self._new[layer], (key_NH1D, value_NH1D), strict=True):
            if self._flat_NH is None:
                store.copy_(new.squeeze(2))
            else:
                store.index_copy_(0, self._flat_NH, new.reshape(-1, new.shape[-1]))
        return *self._now[layer], self._mask_N11T

    def _grow(self, tokens: int, prompt: PromptCache | None = None) -> None:
        """Storage for at least `tokens` tokens a row."""
        held = 0 if self._keys is None else self._keys.shape[3]
        capacity = max(tokens, min(int(held * _GROWTH), self._max_tokens))
        old = (self._keys, self._values) if self._keys is not None else (None, None)
        like = (prompt.keys, prompt.values) if prompt is not None else (self._keys[:, 0], self._values[:, 0])
        grown = []
        for before, sample in zip(old, like, strict=True):
            layers, heads, _, dim = sample.shape
            # Zeros, as what lies beyond a short row's end is masked, and 0 * NaN would still be NaN.
            after = sample.new_zeros(layers, self._max_rows, heads, capacity, dim)
            if before is not None:
                after[:, :, :, : before.shape[3]] = before
            grown.append(after)
        self._keys, self._values = grown


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kv_cache: PrefillCache | DecodeCache | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of `query` [N, H * G, S, D] for transformers' AttentionInterface; returns [N, S, H * G, D'].

    With a DecodeCache each row brings one token; otherwise the rows are whole sequences, right-padded: causality alone
    keeps padding out of what is read.
    """
    assert attention_mask is None, "the cache knows the lengths; no padding mask may be given"
    if isinstance(kv_cache, DecodeCache):
        out = _attend_last(query, *kv_cache.append(module.layer_idx, key, value), scaling)
    else:
        if kv_cache is not None:
            kv_cache.append(key, value)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _attend_last(
    query: torch.Tensor,
    key_NHTD: torch.Tensor,
    value_NHTD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """One query token a row against all it holds. The query heads of a key/value head are read as G queries of it."""
    rows, heads, _, dim = key_NHTD.shape
    query_NHGD = query.reshape(rows, heads, -1, dim)
    scale = dim**-0.5 if scaling is None else scaling
    # On a CPU two batched products beat the fused kernel, which has nothing to fuse for one token and, where keys and
    # values differ in width (latent attention), falls back to copies: 1.1-4 times, more with more threads.
    attention = _products if query.device.type == "cpu" else _fused
    return attention(query_NHGD, key_NHTD, value_NHTD, mask, scale).reshape(rows, -1, 1, value_NHTD.shape[-1])


def _products(
    query_NHGD: torch.Tensor, key_NHTD: torch.Tensor, value_NHTD: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = torch.matmul(query_NHGD * scale, key_NHTD.transpose(2, 3)).float()
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1).to(value_NHTD.dtype), value_NHTD)


def _fused(
    query_NHGD: torch.Tensor, key_NHTD: torch.Tensor, value_NHTD: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    bias = None if mask is None else mask.to(query_NHGD.dtype)
    return F.scaled_dot_product_attention(query_NHGD, key_NHTD, value_NHTD, attn_mask=bias, scale=scale)


AttentionInterface.register(ATTENTION, attend)
