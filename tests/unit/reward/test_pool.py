"""The pool: hard limits, crashes survived, nothing left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from r1mega.reward.compose import Rule
from r1mega.reward.pool import RewardPool
from r1mega.types import Prompt, Reward, Score

LIMIT = 1.0
HALF = Prompt(id="p", question="?", answer=r"\frac{1}{2}")
# math-verify tries to evaluate this one; far beyond any memory, and not interruptible by a signal handler.
HANGING = r"<answer> 9^{9^{9^9}} </answer>"


def _play(prompt: Prompt, text: str) -> Score:
    """A reward that does what the text says, for want of models that crash on demand."""
    if text == "die":
        os._exit(7)
    if text == "raise":
        raise KeyError("gone")
    if text == "modules":
        return Score(float("torch" in sys.modules), reason=str(os.getpid()))
    if text == "memory":
        return Score(float(len(bytearray(64 << 30))))
    if text == "sleep":
        time.sleep(60)
    return Score(float(len(text)))


def _player() -> Reward:
    return _play


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(functools.partial(Rule, {"accuracy": 1.0}), workers=1, timeout_seconds=LIMIT) as running:
        yield running


@pytest.fixture(scope="module")
def playing() -> Iterator[RewardPool]:
    with RewardPool(_player, workers=1, timeout_seconds=LIMIT) as running:
        yield running


def test_a_hanging_expression_is_killed_within_the_limit_and_the_next_text_is_scored(pool: RewardPool) -> None:
    assert pool.submit(HALF, "<answer> 3/6 </answer>").result(timeout=60).value == 1.0  # the worker is up
    began = time.monotonic()
    hanging = pool.submit(HALF, HANGING)
    following = pool.submit(HALF, "<answer> 4/8 </answer>")
    score = hanging.result(timeout=60)
    assert time.monotonic() - began < LIMIT + 2
    assert score.value == 0.0
    assert score.error is not None
    assert "within 1 s" in score.error
    assert following.result(timeout=60).value == 1.0


def test_what_is_decided_at_once_does_not_wait_for_a_busy_worker(pool: RewardPool) -> None:
    hanging = pool.submit(HALF, HANGING)
    plain = pool.submit(Prompt(id="q", question="?", answer="12"), "<answer> 13 </answer>")
    assert plain.done()
    assert plain.result().value == 0.0
    assert not hanging.done()
    assert hanging.result(timeout=60).error


def test_a_crashed_worker_is_replaced(playing: RewardPool) -> None:
    score = playing.submit(HALF, "die").result(timeout=60)
    assert (score.value, score.error) == (0.0, "the reward worker died (exit code 7)")
    assert playing.submit(HALF, "four").result(timeout=60).value == 4.0


def test_a_reward_that_raises_fails_on_its_text_only(playing: RewardPool) -> None:
    assert playing.submit(HALF, "raise").result(timeout=60) == Score(0.0, error="KeyError: 'gone'")
    assert playing.submit(HALF, "four").result(timeout=60).value == 4.0


def test_a_worker_cannot_take_the_memory_of_the_machine(playing: RewardPool) -> None:
    error = playing.submit(HALF, "memory").result(timeout=60).error
    assert error is not None
    assert "MemoryError" in error


def test_a_worker_is_another_process_and_imports_no_torch(playing: RewardPool) -> None:
    score = playing.submit(HALF, "modules").result(timeout=60)
    assert score.value == 0.0
    assert int(score.reason) != os.getpid()


def test_close_leaves_no_worker_and_settles_what_was_to_come() -> None:
    before = set(multiprocessing.active_children())
    pool = RewardPool(_player, workers=2, timeout_seconds=60)
    pool.submit(HALF, "up").result(timeout=60)
    waiting = [pool.submit(HALF, "sleep") for _ in range(4)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    pool.close()
    pool.close()  # a second call does nothing
    assert set(multiprocessing.active_children()) <= before
    assert not any(worker.is_alive() for worker in workers)
    assert all(future.result(timeout=10).error for future in waiting)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(HALF, "late")


def test_workers_of_a_killed_program_end_by_themselves() -> None:
    program = f"""
        import multiprocessing, os, time
        from functools import partial
        from r1mega.reward.compose import Rule
        from r1mega.reward.pool import RewardPool
        from r1mega.types import Prompt
        pool = RewardPool(partial(Rule, {{"accuracy": 1.0}}), workers=1, timeout_seconds=1.5)
        prompt = Prompt(id="p", question="?", answer="1/2")
        assert pool.submit(prompt, "<answer> 3/6 </answer>").result().value == 1.0
        pool.submit(prompt, {HANGING!r})
        time.sleep(0.5)
        print(multiprocessing.active_children()[0].pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = int(done.stdout)
    deadline = time.monotonic() + 8
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(worker), done.stderr


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_workers_texts_are_scored_in_this_process() -> None:
    before = set(multiprocessing.active_children())
    with RewardPool(_player, workers=0, timeout_seconds=LIMIT) as pool:
        assert pool.submit(HALF, "modules").result().reason == str(os.getpid())
        assert pool.submit(HALF, "raise").result().error == "KeyError: 'gone'"
        assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("workers", "limit", "message"), [(-1, 1.0, "workers must be 0"), (1, 0.0, "must be positive")]
)
def test_impossible_settings_are_refused(workers: int, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(_player, workers=workers, timeout_seconds=limit)


class _Patient:
    """Takes longer on the question `slow`, and may."""

    def __call__(self, prompt: Prompt, text: str) -> Score:
        time.sleep(float(text))
        return Score(1.0)

    def seconds(self, prompt: Prompt) -> float | None:
        return 30.0 if prompt.id == "slow" else None


def test_a_question_may_have_a_limit_of_its_own() -> None:
    with RewardPool(_Patient, workers=1, timeout_seconds=0.5) as pool:
        assert pool.submit(Prompt("slow", "?", ""), "1").result(timeout=60) == Score(1.0)
        assert "within 0.5 s" in pool.submit(Prompt("p", "?", ""), "20").result(timeout=60).error
