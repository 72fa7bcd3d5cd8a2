from __future__ import annotations

import pytest

from r1mega.curation.curate import Settings, curate
from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.filters import Candidate, Limits


def some(*responses: str, prompt: str = "Why?", wrong: int | None = None) -> list[Candidate]:
    return [
        Candidate("f:1", j, prompt, text, tokens=len(text), parts={"accuracy": float(j != wrong)})
        for j, text in enumerate(responses)
    ]


def kept(outcome) -> list[int]:
    return [one.candidate.sample for one in outcome.kept]


def test_duplicates_by_words() -> None:
    """The first stays of what differs in case, blanks and marks only; the same answer to another question stays too."""
    samples = some("It is 42.", "it is  42", "It is 43.", "+", "-", "+")
    other = [Candidate("f:2", 9, "Who?", "It is 42.", parts={"accuracy": 1.0})]
    outcome = curate([*samples, *other], Settings())
    assert kept(outcome) == [0, 2, 3, 4, 9]
    assert outcome.counts() == {"duplicate": 2}
    twin = [Candidate("f:3", 7, "why", "it is 42", parts={"accuracy": 1.0})]  # the same question in another row
    assert kept(curate([*samples, *twin], Settings())) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("choose", "expected"),
    [("shortest", [1, 3]), ("first", [0, 1])],
)
def test_quota(choose: str, expected: list[int]) -> None:
    samples = some("a b c d", "a", "a b c", "a b")
    outcome = curate(samples, Settings(per_prompt=2, choose=choose))
    assert kept(outcome) == expected and outcome.counts() == {"quota": 2}
    assert all(one.passed[-2:] == ("duplicate", "quota") for one in outcome.kept)


def test_quota_at_random_is_the_seeds_and_takes_every_sample_in_time() -> None:
    samples = some(*(f"a{k}" for k in range(6)))
    chosen = [tuple(kept(curate(samples, Settings(per_prompt=2, choose="random", seed=seed)))) for seed in range(40)]
    assert chosen == [
        tuple(kept(curate(samples, Settings(per_prompt=2, choose="random", seed=seed)))) for seed in range(40)
    ]
    assert len(set(chosen)) > 8 and {j for pair in chosen for j in pair} == set(range(6))
    counted = [sum(j in pair for pair in chosen) for j in range(6)]
    assert min(counted) >= 4 and max(counted) <= 24  # 13.3 on the mean


def test_every_sample_is_counted_once() -> None:
    samples = some("x", "y", "y.", "z z", "w w w", wrong=0)
    outcome = curate(samples, Settings(per_prompt=2))
    assert kept(outcome) == [1, 3]
    assert outcome.counts() == {"duplicate": 1, "quota": 1, "wrong": 1}
    assert len(outcome.kept) + sum(outcome.counts().values()) == len(samples)


def test_benchmarks_are_kept_out_of_prompts_and_where_asked_of_responses() -> None:
    benchmarks = Benchmarks([("b", "one two three four")], n=3)
    clean, dirty = some("four five", prompt="Zero one two?"), some("yes", prompt="So: one, TWO  three!")
    outcome = curate([*clean, *dirty], Settings(), benchmarks)
    assert [one.candidate.response for one in outcome.kept] == ["four five"]
    assert outcome.counts() == {"contaminated": 1} and "contaminated" in outcome.kept[0].passed
    told = some("it is two three four")
    assert not curate(told, Settings(), benchmarks).dropped
    assert curate(told, Settings(check_responses=True), benchmarks).counts() == {"contaminated": 1}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="choose: got 'best'"):
        Settings(choose="best")
    with pytest.raises(ValueError, match="per_prompt: got -1"):
        Settings(per_prompt=-1)


def test_a_limit_is_the_settings() -> None:
    samples = some("<think>a b c</think> d", "plain")
    assert kept(curate(samples, Settings(limits=Limits(form="think")))) == [0]
