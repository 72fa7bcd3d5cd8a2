"""Sequences that come in pieces: stopped under one version of the weights, continued under another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from r1mega.types import Completion, FinishReason, Span


def join(first: Completion | None, second: Completion) -> Completion:
    """The sequence of two pieces, the second of which was asked for as the continuation of the first.

    The engine tells the second's experts from the prompt on, as it read the first again under its own weights; of the
    first those stay that it was generated with.
    """
    if first is None:
        return second
    offset = len(first.token_ids)
    spans = list(first.spans)
    for span in second.spans:
        if spans and spans[-1].weight_version == span.weight_version:
            spans[-1] = replace(spans[-1], end=span.end + offset)
        else:
            spans.append(Span(span.weight_version, span.start + offset, span.end + offset))
    experts = second.routed_experts
    if experts is not None and first.routed_experts is not None:
        known = len(first.routed_experts)
        experts = torch.cat([first.routed_experts, experts[known:]])
    return replace(
        second,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=[*first.logprobs, *second.logprobs],
        weight_version=spans[-1].weight_version if spans else second.weight_version,
        spans=tuple(spans),
        routed_experts=experts,
    )


def cut(sequence: Completion, num_tokens: int, finish_reason: FinishReason) -> Completion:
    """The first so many tokens, which ended as `finish_reason` says."""
    spans = tuple(replace(span, end=min(span.end, num_tokens)) for span in sequence.spans if span.start < num_tokens)
    experts, less = sequence.routed_experts, max(0, len(sequence.token_ids) - num_tokens)
    return replace(
        sequence,
        token_ids=sequence.token_ids[:num_tokens],
        logprobs=sequence.logprobs[:num_tokens],
        finish_reason=finish_reason,
        weight_version=spans[-1].weight_version if spans else sequence.weight_version,
        spans=spans,
        routed_experts=None if experts is None else experts[: len(experts) - less],
    )


def without_unchecked(sequence: Completion, unchecked: int) -> Completion:
    """Less the last tokens of a sequence that was broken off.

    SGLang 0.5.21 looks at a request's abort before it looks whether its newest tokens end it
    (`Req.update_finish_state`): the last one may be the end of the sequence and not be recognised as such. One decoding
    step gives one token, with speculative decoding several.
    """
    return cut(sequence, max(0, len(sequence.token_ids) - unchecked), FinishReason.abort)


def end_at_stop(
    sequence: Completion, boundary: int, stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> Completion:
    """The sequence up to a stop string that begins before token `boundary`, a seam between two pieces, and ends after.

    A server looks for stop strings in what it has generated itself. Neither piece contains one as a whole but, at its
    end, the second.
    """
    # A token is a character or more, or one of up to four bytes of one.
    reach = 4 * max((len(text) for text in stop), default=0)
    begin = max(0, boundary - reach)
    for end in range(boundary + 1, min(boundary + reach, len(sequence.token_ids)) + 1):
        text = decode(sequence.token_ids[begin:end])
        if any(wanted in text for wanted in stop):
            return cut(sequence, end, FinishReason.stop)
    return sequence
