"""How token terms become one loss: the weight of every token, from counts over the whole update."""

from __future__ import annotations

from collections.abc import Sequence

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum", "constant")


def token_weights(
    num_loss_tokens: Sequence[int], aggregation: str, *, constant_length: int | None = None
) -> list[float]:
    """The weight of each token of each sequence, so that the loss of an update is a plain weighted sum.

    With N sequences that have loss tokens, |o_i| such tokens in sequence i:

    | aggregation   | weight              | source                                                                |
    |---------------|---------------------|-----------------------------------------------------------------------|
    | sequence_mean | 1 / (N |o_i|)       | DeepSeekMath (arXiv 2402.03300), Eq. 3                                |
    | token_mean    | 1 / sum_i |o_i|     | DAPO (arXiv 2503.14476), Eq. 8                                        |
    | sequence_sum  | 1 / N               | the token sum of each sequence, as in REINFORCE                       |
    | constant      | 1 / (N L)           | Dr.GRPO (arXiv 2503.20783), with L the most tokens a response may have |

    Args:
        num_loss_tokens: loss tokens of every sequence of the whole update, not of this rank or micro-batch: that makes
            the loss independent of how the update is cut. 0 leaves a sequence out.
        aggregation: one of AGGREGATIONS.
        constant_length: L, for `constant` only.

    Returns:
        One weight a sequence, to be given to each of its loss tokens; 0.0 for a sequence without any.

    Raises:
        ValueError: an unknown aggregation, or `constant` without a positive constant_length.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: got {aggregation!r}; must be one of {', '.join(AGGREGATIONS)}")
    if aggregation == "constant" and (constant_length is None or constant_length < 1):
        raise ValueError(
            f"constant_length: got {constant_length}; must be at least 1 for aggregation=constant; "
            "pass the most tokens a response may have"
        )
    assert all(count >= 0 for count in num_loss_tokens), num_loss_tokens
    num_sequences = sum(count > 0 for count in num_loss_tokens)
    num_tokens = sum(num_loss_tokens)

    def weight(count: int) -> float:
        if aggregation == "sequence_mean":
            return 1.0 / (num_sequences * count)
        if aggregation == "token_mean":
            return 1.0 / num_tokens
        if aggregation == "sequence_sum":
            return 1.0 / num_sequences
        return 1.0 / (num_sequences * constant_length)

    return [weight(count) if count > 0 else 0.0 for count in num_loss_tokens]
