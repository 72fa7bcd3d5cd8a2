"""No answer hangs the pool, crashes it, leaves a process behind, or scores 1 without being right."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hostile_answers as hostile

from r1mega.reward.compose import Rule
from r1mega.reward.pool import RewardPool
from r1mega.types import Prompt, Score

LIMIT = 1.0
START = 30.0  # what a worker's imports may take on a busy machine
PLAIN = Prompt("p", hostile.QUESTION, hostile.NUMBER)
# Plain numbers never reach math-verify when the known answer is one too; this known answer sends them all there.
FRACTION = Prompt("p", hostile.QUESTION, rf"\frac{{{2 * int(hostile.NUMBER)}}}{{2}}")
RIGHT = hostile.tagged(f"{3 * int(hostile.NUMBER)}/3")


def children() -> set[int]:
    """Processes of this one, but for multiprocessing's own, which stays to the end."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.ZombieProcess):  # says no more of itself, and is there all the same
            if any("resource_tracker" in word for word in child.cmdline()):
                continue
        found.add(child.pid)
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    before = children()
    with RewardPool(functools.partial(Rule, {"accuracy": 1.0}), workers=2, timeout_seconds=LIMIT) as running:
        yield running
    assert children() <= before


def scores(pool: RewardPool, prompt: Prompt, texts: list[str]) -> list[Score]:
    began = time.monotonic()
    futures = [pool.submit(prompt, text) for text in texts]
    got = [future.result(timeout=len(texts) * (LIMIT + START)) for future in futures]
    killed = sum(score.error is not None for score in got)
    print(f"{len(texts)} answers in {time.monotonic() - began:.1f} s, {killed} stopped")
    return got


def check(pool: RewardPool, texts: list[str], prompts: tuple[Prompt, ...] = (PLAIN, FRACTION)) -> None:
    for prompt in prompts:
        for text, score in zip(texts, scores(pool, prompt, texts), strict=True):
            assert score.value == 0.0, text[:200]
            assert score.error is not None or score.reason, text[:200]
            assert score.error is None or "within 1 s" in score.error or "died" in score.error, (text[:200], score)
    assert pool.submit(FRACTION, RIGHT).result(timeout=60) == Score(1.0, {"accuracy": 1.0})


def test_there_are_two_hundred_of_them() -> None:
    assert len(set(hostile.ANSWERS)) >= 200


def test_some_hostile_answers(pool: RewardPool) -> None:
    check(pool, hostile.SOME, (FRACTION,))


def test_some_random_answers(pool: RewardPool) -> None:
    check(pool, hostile.random_answers(60, seed=1), (FRACTION,))


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_all_hostile_answers(pool: RewardPool) -> None:
    check(pool, hostile.ANSWERS)


@pytest.mark.extended
@pytest.mark.timeout(1200)
def test_a_thousand_random_answers(pool: RewardPool) -> None:
    check(pool, hostile.random_answers(1000))


@pytest.mark.parametrize("text", [hostile.tagged(hostile.NUMBER), hostile.boxed(hostile.NUMBER), RIGHT])
def test_the_right_answer_is_right(pool: RewardPool, text: str) -> None:
    """The control: the wrappings of the hostile ones are read."""
    assert pool.submit(FRACTION, text).result(timeout=60).value == 1.0
