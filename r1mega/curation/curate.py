"""Samples in, kept samples out, and why each of the others is not among them. A pure function of samples and settings.

After the filters of single responses: nothing that overlaps with a benchmark, nothing twice, and so many of a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.filters import Candidate, Limits, sieve
from r1mega.curation.texts import normalised
from r1mega.parallel.seed import derive

CHOICES = ("shortest", "first", "random")
CONTAMINATED, DUPLICATE, QUOTA = "contaminated", "duplicate", "quota"


@dataclass(frozen=True)
class Settings:
    """How samples are curated. `per_prompt` responses of a prompt are kept at most, 0: all; chosen as `choose` says,
    by `seed` where at random. With `check_responses` responses are held against the benchmarks as prompts are."""

    limits: Limits = field(default_factory=Limits)
    per_prompt: int = 0
    choose: str = "shortest"
    seed: int = 0
    check_responses: bool = False

    def __post_init__(self) -> None:
        if self.choose not in CHOICES:
            raise ValueError(f"choose: got {self.choose!r}; must be one of {', '.join(CHOICES)}")
        if self.per_prompt < 0:
            raise ValueError(f"per_prompt: got {self.per_prompt}; must be at least 0")


@dataclass(frozen=True)
class Kept:
    """A sample that stays, and the names of the filters that looked at it."""

    candidate: Candidate
    passed: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Every sample is in exactly one of the two: kept, in the order they came in, or dropped with its reason."""

    kept: list[Kept]
    dropped: list[tuple[Candidate, str]]

    def counts(self) -> dict[str, int]:
        """Dropped samples by reason, sorted by name."""
        return dict(sorted(Counter(reason for _, reason in self.dropped).items()))


def curate(candidates: Iterable[Candidate], settings: Settings, benchmarks: Benchmarks | None = None) -> Outcome:
    """Sort the candidates into those that stay and those that do not."""
    reasons: list[str | None] = []
    passed: list[tuple[str, ...]] = []
    every = list(candidates)
    for one in every:
        reason, names = sieve(one, settings.limits)
        reasons.append(reason)
        passed.append(names)
    if benchmarks is not None:
        left = [place for place, reason in enumerate(reasons) if reason is None]
        found = benchmarks.matches([every[place].prompt for place in left])
        if settings.check_responses:
            answers = benchmarks.matches([every[place].response for place in left])
            found = [first or second for first, second in zip(found, answers, strict=True)]
        for place, match in zip(left, found, strict=True):
            reasons[place] = CONTAMINATED if match else None
            passed[place] += () if match else (CONTAMINATED,)
    _drop_duplicates(every, reasons)
    _keep_quota(every, reasons, settings)
    names = (DUPLICATE, QUOTA) if settings.per_prompt else (DUPLICATE,)
    return Outcome(
        kept=[Kept(one, (*passed[i], *names)) for i, one in enumerate(every) if reasons[i] is None],
        dropped=[(one, str(reasons[i])) for i, one in enumerate(every) if reasons[i] is not None],
    )


def _drop_duplicates(every: Sequence[Candidate], reasons: list[str | None]) -> None:
    """Of responses to one question with the same words the first stays. (Questions with the same words are one.)"""
    seen: set[tuple[str, str]] = set()
    for place, one in enumerate(every):
        if reasons[place] is not None:
            continue
        key = normalised(one.prompt), _key(one.response)
        if key in seen:
            reasons[place] = DUPLICATE
        seen.add(key)


def _key(text: str) -> str:
    """Words where there are any, else the text as it stands: `+` and `-` are not the same answer."""
    return normalised(text) or text.strip()


def _keep_quota(every: Sequence[Candidate], reasons: list[str | None], settings: Settings) -> None:
    """Keep so many responses of each question."""
    if not settings.per_prompt:
        return
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(every):
        if reasons[place] is None:
            groups.setdefault(normalised(one.prompt), []).append(place)
    for places in groups.values():
        ordered = sorted(places, key=lambda place: _rank(every[place], place, settings))
        for place in ordered[settings.per_prompt :]:
            reasons[place] = QUOTA


def _rank(one: Candidate, place: int, settings: Settings) -> tuple[int, int]:
    """Smallest first; ties in the order of the samples."""
    if settings.choose == "shortest":
        return one.tokens or len(one.response), place
    if settings.choose == "random":
        return derive(settings.seed, "quota", one.prompt_id, one.sample), place
    return 0, place
