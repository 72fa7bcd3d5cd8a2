"""Rewards in worker processes that can be killed, so that no expression a model writes can hold up a run.

A time limit inside a process cannot stop one long operation of the interpreter (`9**9**9`); killing the process can.
Workers are started with `spawn`: a forked copy of a process that runs torch or gloo threads may hang for ever.

Spawned workers import the main module of the program again. A program started as `python -m package` (a `__main__`
module) is spared that; one whose main module imports torch pays for it in the start of each worker.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, TimeoutError
from typing import Protocol, runtime_checkable

from pebble import ProcessExpired, ProcessPool

from r1mega.types import Prompt, Reward, Score

# Powers of powers ask for memory without end. Address space of one worker in bytes; sympy's own use is below 1 GiB.
WORKER_MEMORY_BYTES = 4 << 30
_ALARM_AFTER_SECONDS = 2.0
_CLOSED = "the reward pool was closed before the text was scored"


@runtime_checkable
class PreparedReward(Protocol):
    """A reward that can do its slow imports ahead of the first text, outside the time limit."""

    def prepare(self) -> None:
        """Import and warm up whatever the first call would wait for."""


@runtime_checkable
class QuickReward(Protocol):
    """A reward that can judge some texts at once, in the caller's process."""

    def quick(self, prompt: Prompt, text: str) -> Score | None:
        """The score where it is surely cheap to get, else None."""


@runtime_checkable
class LimitedReward(Protocol):
    """A reward that takes longer on the texts to some questions than the pool's limit."""

    def seconds(self, prompt: Prompt) -> float | None:
        """The limit for a text to this question, where it needs one of its own."""


class RewardPool:
    """Scores texts beside the caller's work, each within a hard limit.

    `reward_factory` is called once in each worker and once here; it must be picklable, as a module's function or a
    `functools.partial` of a class is. What the reward's own `quick` method can judge never leaves this process.
    `timeout_seconds` counts from the moment a worker begins with a text, not from `submit`; the reward's own `seconds`
    take its place where they are longer.

    With `workers=0` texts are scored in the calling process, and nothing limits how long one takes.
    """

    def __init__(self, reward_factory: Callable[[], Reward], workers: int, timeout_seconds: float) -> None:
        if workers < 0:
            raise ValueError(f"the number of reward workers must be 0 (in this process) or more, got {workers}")
        if timeout_seconds <= 0:
            raise ValueError(f"the time limit of a reward must be positive, got {timeout_seconds} seconds")
        self._reward = reward_factory()
        self._timeout = timeout_seconds
        self._closed = False
        self._pending: set[Future[Score]] = set()
        self._pool: ProcessPool | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(workers, initializer=_start_worker, initargs=(reward_factory,), context=context)

    def submit(self, prompt: Prompt, text: str) -> Future[Score]:
        """The score of `text`, to come.

        The future never raises what happens to a worker: running out of time, memory or luck gives a Score of 0 with
        `error` set, and the pool goes on with a fresh worker.

        Raises RuntimeError after `close`, and when the workers cannot start (their error is logged).
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        outcome: Future[Score] = Future()
        # From here on nobody can cancel it, so that setting the result below cannot fail.
        outcome.set_running_or_notify_cancel()
        score = self._reward.quick(prompt, text) if isinstance(self._reward, QuickReward) else None
        if score is not None:
            outcome.set_result(score)
        elif self._pool is None:
            outcome.set_result(_guarded(self._reward, prompt, text))
        else:
            self._pending.add(outcome)
            limit = self._limit(prompt)
            running = self._pool.schedule(_score, args=(prompt, text, limit), timeout=limit)
            running.add_done_callback(lambda done: self._settle(outcome, self._result(done, limit)))
        return outcome

    def _limit(self, prompt: Prompt) -> float:
        own = self._reward.seconds(prompt) if isinstance(self._reward, LimitedReward) else None
        return self._timeout if own is None else max(own, self._timeout)

    def close(self) -> None:
        """Kill the workers; scores that were still to come get `error` set. No worker is left when this returns."""
        if self._closed:
            return
        self._closed = True
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
        # The pool's threads have ended, so nobody else settles these any more.
        for outcome in tuple(self._pending):
            self._settle(outcome, Score(0.0, error=_CLOSED))

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _settle(self, outcome: Future[Score], score: Score) -> None:
        self._pending.discard(outcome)
        outcome.set_result(score)

    def _result(self, done: Future[Score], limit: float) -> Score:
        try:
            return done.result()
        except TimeoutError:
            return Score(0.0, error=f"no score within {limit:g} s; the worker was stopped")
        except ProcessExpired as error:
            return Score(0.0, error=f"the reward worker died (exit code {error.exitcode})")
        except CancelledError:
            return Score(0.0, error=_CLOSED)
        except Exception as error:  # a future left open would hang whoever waits for it
            return Score(0.0, error=f"{type(error).__name__}: {error}")


_worker_reward: Reward | None = None


def _start_worker(reward_factory: Callable[[], Reward]) -> None:
    global _worker_reward
    # Ctrl-C goes to the whole process group; the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    _worker_reward = reward_factory()
    if isinstance(_worker_reward, PreparedReward):
        _worker_reward.prepare()


def _score(prompt: Prompt, text: str, timeout_seconds: float) -> Score:
    assert _worker_reward is not None, "the pool's initializer has run before the first text"
    # The parent kills a worker that takes too long. Should the parent itself have been killed, the alarm does it:
    # nothing handles SIGALRM, so the system ends the process even inside one endless operation of the interpreter.
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _ALARM_AFTER_SECONDS)
    try:
        return _guarded(_worker_reward, prompt, text)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _guarded(reward: Reward, prompt: Prompt, text: str) -> Score:
    """A reward that raises has failed on this text only; the fault is kept in the Score, not lost."""
    try:
        return reward(prompt, text)
    except Exception as error:
        return Score(0.0, error=f"{type(error).__name__}: {error}")
