"""From graded samples to numbers: pass@k, cons@k, and how far they may be off.

A problem has n samples, each right or not (a grader may also give a share between 0 and 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n of which c are: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, https://arxiv.org/abs/2107.03374, Eq. 1. Raises ValueError for k outside 1..n or c outside 0..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be had from {num_samples} samples; k must be between 1 and that number")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right ones of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def cluster(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int | None]:
    """The class of each answer, numbered in the order in which classes first appear; None where there is no answer.

    An answer joins the first class whose first member it equals. `same` is asked once for two different texts, the
    earlier one first.
    """
    heads: list[str] = []
    known: dict[str, int] = {}
    classes: list[int | None] = []
    for answer in answers:
        if answer is None:
            classes.append(None)
            continue
        if answer not in known:
            place = next((i for i, head in enumerate(heads) if same(head, answer)), len(heads))
            if place == len(heads):
                heads.append(answer)
            known[answer] = place
        classes.append(known[answer])
    return classes


def consensus(classes: Sequence[int | None], scores: Sequence[float]) -> float:
    """The score of the answer that most samples give; where several lead, the mean of theirs; 0 where none answers.

    The score of a class is that of its first member, `scores` having one for each sample.
    """
    votes = Counter(number for number in classes if number is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [number for number, count in votes.items() if count == most]
    return sum(scores[classes.index(number)] for number in leaders) / len(leaders)


def cons_at_k(classes: Sequence[int | None], scores: Sequence[float], k: int) -> float:
    """`consensus` of k samples: its mean over the consecutive groups of k that the samples make.

    Raises ValueError for k outside 1..n.
    """
    if not 1 <= k <= len(classes):
        raise ValueError(f"cons@{k} cannot be had from {len(classes)} samples; k must be between 1 and that number")
    starts = range(0, len(classes) - k + 1, k)
    return sum(consensus(classes[i : i + k], scores[i : i + k]) for i in starts) / len(starts)


def bootstrap(values: Sequence[float], resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean by the percentile bootstrap over problems (Efron 1979), `values` having one for each.

    The same for the same seed. It covers which problems were asked, and not what else could be sampled for them.
    """
    sample_P = np.asarray(values, dtype=np.float64)
    draw = np.random.Generator(np.random.Philox(seed))
    means = [sample_P[draw.integers(len(sample_P), size=len(sample_P))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean by Student's t, for the few values that runs with several seeds are.

    A bootstrap of three is their range, which holds the mean less often than it says. Raises ValueError for fewer than
    two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval of {len(values)} values: at least two are needed")
    from scipy.stats import t  # here: it takes most of a second

    sample_S = np.asarray(values, dtype=np.float64)
    error = sample_S.std(ddof=1) / math.sqrt(len(sample_S))
    half = float(t.ppf((1 + level) / 2, len(sample_S) - 1)) * error
    return float(sample_S.mean() - half), float(sample_S.mean() + half)


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
