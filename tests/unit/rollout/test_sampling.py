"""Picking tokens: numbers worked out by hand, and stop strings over byte tokens."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.rollout.sampling import StopRule, draw_uniforms, sample_tokens

# Probabilities 0.5, 0.25, 0.125, 0.125, in another order.
LOGITS = torch.tensor([[math.log(0.125), math.log(0.5), math.log(0.125), math.log(0.25)]])


def _sample(uniform: float, temperature: float = 1.0, top_p: float = 1.0) -> tuple[int, float]:
    tokens, logprobs = sample_tokens(LOGITS, temperature, top_p, torch.tensor([uniform], dtype=torch.float64))
    return tokens.item(), logprobs.item()


@pytest.mark.parametrize(
    ("uniform", "token", "probability"),
    [
        (0.0, 0, 0.125),
        (0.12, 0, 0.125),
        (0.13, 1, 0.5),
        (0.62, 1, 0.5),
        (0.63, 2, 0.125),
        (0.76, 3, 0.25),
        (0.9999999, 3, 0.25),
    ],
)
def test_inverse_of_the_cumulative_distribution(uniform: float, token: int, probability: float) -> None:
    assert _sample(uniform) == (token, pytest.approx(math.log(probability)))


def test_temperature_sharpens() -> None:
    # At temperature 0.5 the probabilities are squared: 1/64, 16/64, 1/64, 4/64 of 22/64.
    assert _sample(0.5 / 22, temperature=0.5) == (0, pytest.approx(math.log(1 / 22)))
    assert _sample(1.5 / 22, temperature=0.5) == (1, pytest.approx(math.log(16 / 22)))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.74, {1, 3}), (0.76, {0, 1, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_stays_in_the_nucleus(top_p: float, kept: set[int]) -> None:
    drawn = {_sample(i / 997, top_p=top_p) for i in range(997)}
    assert {token for token, _ in drawn} == kept
    # The log-probs are those of the whole distribution.
    for token, logprob in drawn:
        assert logprob == pytest.approx(LOGITS[0, token].item(), abs=1e-6)


def test_top_p_keeps_the_proportions() -> None:
    tokens = [_sample(i / 999, top_p=0.7)[0] for i in range(999)]
    assert (tokens.count(1), tokens.count(3)) == (666, 333)


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        tokens, _ = sample_tokens(logits, 1.0, 1.0, torch.tensor([uniform], dtype=torch.float64))
        assert tokens.item() in (1, 3)


def test_greedy_takes_the_most_probable_token_and_its_log_prob() -> None:
    tokens, logprobs = sample_tokens(2 * LOGITS, 0.0, 1.0, None)
    assert (tokens.item(), logprobs.item()) == (1, pytest.approx(math.log(16 / 22)))


def test_uniforms_depend_on_seed_and_position_only() -> None:
    numbers = draw_uniforms(3, 7, 4, 1000)
    assert torch.equal(numbers, draw_uniforms(3, 7, 4, 1000))
    others = [draw_uniforms(3, 8, 4, 1000), draw_uniforms(4, 7, 4, 1000), draw_uniforms(7, 3, 4, 1000)]
    for other in others:
        assert not (numbers == other).any()
    assert numbers.dtype == torch.float64
    # 4000 draws: the mean is within 5 standard deviations, 5 / sqrt(12 * 4000).
    assert abs(numbers.mean().item() - 0.5) < 0.023
    assert numbers.min() >= 0 and numbers.max() < 1


class Bytes:
    """A tokenizer of one byte a token, and a token 256 of several letters."""

    def __len__(self) -> int:
        return 257

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return b"".join(b"x</a>y" if token == 256 else bytes([token]) for token in token_ids).decode(errors="replace")


def _rule(*stop: str, tokens: tuple[int, ...] = (), vocab_size: int = 300) -> StopRule:
    return StopRule(vocab_size, tokens, stop, Bytes(), torch.device("cpu"))


def _first_stop(rule: StopRule, text: bytes | list[int]) -> int | None:
    """The number of tokens after which the rule ends `text`, as the decoding loop asks it."""
    tokens = list(text)
    for count in range(1, len(tokens) + 1):
        last = torch.tensor([tokens[count - 1]])
        if rule.ends(last).item():
            return count
        if rule.reads_text and rule.may_end(last).item() and rule.text_ends(tokens[max(0, count - rule.tail) : count]):
            return count
    return None


def test_stop_string_at_its_last_byte() -> None:
    assert _first_stop(_rule("</a>"), b"some text < / a> </a> more") == 21
    assert _first_stop(_rule("</a>"), b"some text </b>") is None


def test_stop_string_of_characters_cut_into_bytes() -> None:
    text = "né€é€".encode()
    assert _first_stop(_rule("é€"), text) == len("né€".encode())


def test_stop_string_inside_a_token_and_after_long_text() -> None:
    assert _first_stop(_rule("</a>"), [*b"a" * 50, 256, 65]) == 51


def test_stop_string_that_ends_in_space() -> None:
    assert _first_stop(_rule("end\n "), b"the end\n it is") == 9


def test_only_tokens_that_can_end_a_stop_string_are_read() -> None:
    may_end = _rule("</a>").may_end(torch.arange(300))
    assert may_end[ord(">")] and may_end[256]
    assert not may_end[ord("a")]
    assert not may_end[257:].any()  # rows of the embedding beyond the tokenizer
    assert may_end[200]  # a part of a character


def test_stop_tokens_are_a_table_lookup() -> None:
    rule = _rule(tokens=(5, 299))
    assert rule.ends(torch.tensor([4, 5, 299])).tolist() == [False, True, True]
    assert not rule.reads_text
