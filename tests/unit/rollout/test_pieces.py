from __future__ import annotations

import pytest

from r1mega.rollout.pieces import cut, end_at_stop, join, without_unchecked
from r1mega.types import Completion, FinishReason, Sample, Span


def piece(tokens, version=1, spans=(), finish=FinishReason.abort) -> Completion:
    return Completion(7, 0, list(tokens), [-float(t) for t in tokens], finish, version, tuple(spans))


def test_two_pieces_are_one_sequence() -> None:
    first = piece([1, 2, 3], 4, [Span(2, 0, 2), Span(4, 2, 3)])
    second = piece([5, 6], 6, [Span(4, 0, 1), Span(6, 1, 2)], FinishReason.stop)
    whole = join(first, second)
    assert whole.token_ids == [1, 2, 3, 5, 6] and whole.logprobs == [-1.0, -2.0, -3.0, -5.0, -6.0]
    assert whole.spans == (Span(2, 0, 2), Span(4, 2, 4), Span(6, 4, 5))
    assert whole.finish_reason is FinishReason.stop and whole.weight_version == 6
    assert join(None, second) is second


def test_a_piece_without_tokens() -> None:
    first = piece([1, 2], 2)
    assert join(first, piece([], 4)) == first
    assert join(piece([], 4), first) == first


def test_a_sequence_cut_off() -> None:
    whole = piece([1, 2, 3], 4, [Span(2, 0, 2), Span(4, 2, 3)])
    assert cut(whole, 2, FinishReason.length) == piece([1, 2], 2, [Span(2, 0, 2)], FinishReason.length)
    assert without_unchecked(whole, 1) == piece([1, 2], 2)
    assert without_unchecked(whole, 9).token_ids == []


def letters(tokens) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("text", "boundary", "expected"),
    [
        ("abc</x>de", 5, "abc</x>"),  # the seam is inside it
        ("abc</x>de", 3, "abc</x>"),  # it begins at the seam: the server ends there itself
        ("abc</xyde", 5, "abc</xyde"),
        ("abcde", 0, "abcde"),
    ],
)
def test_a_stop_string_across_the_seam_ends_a_sequence(text: str, boundary: int, expected: str) -> None:
    found = end_at_stop(piece(map(ord, text)), boundary, ["</x>"], letters)
    assert letters(found.token_ids) == expected
    assert (found.finish_reason is FinishReason.stop) == (text != expected)


def test_spans_must_cover_the_tokens() -> None:
    assert piece([1, 2], 3).spans == (Span(3, 0, 2),)
    assert Sample("p", 0, [1], [1], [0.0], FinishReason.stop, 5).spans == (Span(5, 0, 1),)
    for spans in ([Span(1, 0, 1)], [Span(1, 0, 1), Span(1, 0, 2)], [Span(1, 1, 2)], [Span(2, 0, 2)]):
        with pytest.raises(AssertionError):
            piece([1, 2], 1, spans)
