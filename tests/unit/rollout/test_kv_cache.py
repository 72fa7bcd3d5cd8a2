"""The cache against attention written out, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from r1mega.rollout import kv_cache
from r1mega.rollout.kv_cache import DecodeCache, PrefillCache, PromptCache, attend

LAYERS, HEADS, GROUPS, KEY_DIM, VALUE_DIM = 2, 2, 3, 8, 6


def _written_out(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one token [H * G, D] to keys [H, T, D] and values [H, T, D'], in float64: [H * G, D']."""
    rows = []
    for head, vector in enumerate(query.double()):
        key, value = keys[head // GROUPS].double(), values[head // GROUPS].double()
        weights = torch.stack([vector @ k * KEY_DIM**-0.5 for k in key]).exp()
        rows.append((weights / weights.sum()) @ value)
    return torch.stack(rows)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _prompt(tokens: int) -> PromptCache:
    return PromptCache(_random(LAYERS, HEADS, tokens, KEY_DIM), _random(LAYERS, HEADS, tokens, VALUE_DIM))


@pytest.mark.parametrize("attention", ["_products", "_fused"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 9, 1]])
def test_rows_attend_to_their_own_tokens(attention: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_products", getattr(kv_cache, attention))
    monkeypatch.setattr(kv_cache, "_FIRST_TOKENS", 1)  # so that storage grows on the way
    torch.manual_seed(0)
    cache = DecodeCache(max_rows=4, max_tokens=20)
    prompts = [_prompt(length) for length in lengths]
    held = [[(p.keys[layer], p.values[layer]) for layer in range(LAYERS)] for p in prompts]
    for row, prompt in enumerate(prompts):
        cache.fill(row, 1, prompt)
    equal = len(set(lengths)) == 1
    for step in range(4):
        now = torch.tensor(lengths) + step
        cache.begin_step(3, int(now.max()), None if equal else now)
        for layer in range(LAYERS):
            query, key = _random(3, HEADS * GROUPS, 1, KEY_DIM), _random(3, HEADS, 1, KEY_DIM)
            value = _random(3, HEADS, 1, VALUE_DIM)
            out, _ = attend(SimpleNamespace(layer_idx=layer), query, key, value, None, None, cache)
            for row in range(3):
                keys, values = held[row][layer]
                held[row][layer] = (torch.cat([keys, key[row]], 1), torch.cat([values, value[row]], 1))
                want = _written_out(query[row, :, 0], *held[row][layer])
                torch.testing.assert_close(out[row, 0].double(), want, atol=1e-5, rtol=0)
                # Negative control: one token fewer is not the same.
                fewer = _written_out(query[row, :, 0], *(tensor[:, 1:] for tensor in held[row][layer]))
                assert (out[row, 0] - fewer).abs().max() > 1e-3


def test_a_moved_row_takes_its_tokens_along() -> None:
    torch.manual_seed(0)
    cache = DecodeCache(max_rows=3, max_tokens=20)
    first, second = _prompt(4), _prompt(6)
    cache.fill(0, 2, first)
    cache.fill(2, 1, second)
    cache.move([2], [0], 6)
    cache.begin_step(2, 6, torch.tensor([6, 4]))
    keys, values, mask = cache.append(0, _random(2, HEADS, 1, KEY_DIM), _random(2, HEADS, 1, VALUE_DIM))
    assert torch.equal(keys[0, :, :6], second.keys[0]) and torch.equal(values[0, :, :6], second.values[0])
    assert torch.equal(keys[1, :, :4], first.keys[0]) and torch.equal(values[1, :, :4], first.values[0])
    assert mask.isfinite().sum(-1).flatten().tolist() == [7, 5]


def test_prompts_are_split_from_their_padding() -> None:
    torch.manual_seed(0)
    cache = PrefillCache()
    keys, values = _random(LAYERS, 2, HEADS, 5, KEY_DIM), _random(LAYERS, 2, HEADS, 5, VALUE_DIM)
    query = _random(2, HEADS * GROUPS, 5, KEY_DIM)
    for layer in range(LAYERS):
        out, _ = attend(SimpleNamespace(layer_idx=layer), query, keys[layer], values[layer], None, None, cache)
        for token in range(5):
            want = _written_out(query[1, :, token], keys[layer, 1, :, : token + 1], values[layer, 1, :, : token + 1])
            torch.testing.assert_close(out[1, token].double(), want, atol=1e-5, rtol=0)
    short, long = cache.split([3, 5])
    assert torch.equal(short.keys, keys[:, 0, :, :3]) and torch.equal(long.values, values[:, 1])
