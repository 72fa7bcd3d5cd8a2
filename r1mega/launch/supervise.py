"""Start a world of processes and see it to its end: whatever happens to one, none is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from r1mega.launch.rank_processes import POLL_SECONDS, EndedRank, NoRanksError, Rank, start_each, start_forked
from r1mega.loop.stop import STOPPED

# A crash takes its peers with it within moments; wait this long before naming the first of them.
SETTLE_SECONDS = 0.5
TAIL_LINES = 30
# What a rank says when another one vanished: consequences, never the cause.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection was closed|remote process exited|peer .*(exited|closed)"
    r"|failed to recv|socket timeout|store .*(closed|unavailable)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class WorldResult:
    """How a world ended: `exit_code` as a shell would report it; `message` is empty when all went well."""

    exit_code: int
    failed_rank: int | None = None
    message: str = ""


class Companions(Protocol):
    """Processes that live as long as the world does."""

    def start(self) -> None:
        """Start them all."""

    def look(self) -> str | None:
        """See to them; a message where the world has to end because of them."""

    def end(self) -> None:
        """End them all. Harmless when repeated."""


def run_world(
    argv: Sequence[str],
    world_size: int,
    *,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 5.0,
    beside: Companions | None = None,
    ask_to_stop: Callable[[str], None] | None = None,
    divides: bool = False,
) -> WorldResult:
    """Run `argv` once per rank and wait for all of them; `beside` are other processes of the run.

    Each rank gets this process's environment, then `env`, then RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. With
    `divides` the program is started once and becomes all ranks by parallel.fork.divide. A rank's output goes to
    `log_dir/rankN.log`, except that rank 0 keeps the terminal as its standard output. When a rank fails, or on SIGINT
    or SIGTERM, all others get SIGTERM and after `grace_seconds` SIGKILL (at once on a second signal).
    On SIGUSR1 `ask_to_stop` is called with its name; a rank that ends with loop.stop.STOPPED thereafter has not failed.

    Raises OSError where `argv` cannot be started at all.
    """
    assert world_size >= 1, "a world has at least one rank"
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    with _signals(ask_to_stop) as received:
        try:
            if beside is not None:
                beside.start()
            if divides:
                ranks += start_forked(argv, world_size, log_dir, env or {}, lambda: bool(received))
            else:
                ranks.extend(start_each(argv, world_size, log_dir, env or {}))
            return _watch(ranks, received, grace_seconds, beside)
        except NoRanksError as error:
            return _undivided(error, world_size)
        finally:
            _end(ranks, received, grace_seconds)
            if beside is not None:
                beside.end()
            if sys.stdout.isatty():
                print("\x1b[?25h", end="", flush=True)  # a killed live display leaves the cursor hidden


def tail(log: Path, limit: int = TAIL_LINES) -> str:
    """The end of a log: from its last traceback on where that is near, else the last `limit` lines."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64 * 1024))
        lines = file.read().decode("utf-8", errors="replace").rstrip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if starts and len(lines) - starts[-1] <= 2 * limit:
        return "\n".join(lines[starts[-1] :])
    return "\n".join(lines[-limit:])


@contextlib.contextmanager
def _signals(ask_to_stop: Callable[[str], None] | None) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of acting on them; outside the main thread nothing is collected."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    def ask(number: int, _frame: FrameType | None) -> None:
        if ask_to_stop is not None:
            ask_to_stop(signal_name(number))

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    if ask_to_stop is not None:
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ask)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[Rank], received: list[int], grace_seconds: float, beside: Companions | None) -> WorldResult:
    if received and not ranks:
        return WorldResult(128 + received[0], message=f"stopped by {signal_name(received[0])} before there were ranks")
    while any(rank.status is None for rank in ranks):
        _look(ranks)
        if received:
            name = signal.Signals(received[0]).name
            _end(ranks, received, grace_seconds)
            return WorldResult(128 + received[0], message=f"stopped by {name}: all {len(ranks)} ranks have ended")
        if any(rank.has_failed for rank in ranks):
            _settle(ranks, received)
            culprit = min((rank for rank in ranks if rank.has_failed), key=blame)
            _end(ranks, received, grace_seconds)
            return failure(culprit, len(ranks))
        message = beside.look() if beside is not None else None
        if message is not None:
            _end(ranks, received, grace_seconds)
            return WorldResult(1, message=f"{message}\nall {len(ranks)} ranks have ended")
        time.sleep(POLL_SECONDS)
    if any(rank.status == STOPPED for rank in ranks):
        return WorldResult(STOPPED, message=f"stopped as asked, after a checkpoint: all {len(ranks)} ranks have ended")
    return WorldResult(0)


def _settle(ranks: list[Rank], received: list[int]) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and not received and any(rank.status is None for rank in ranks):
        time.sleep(POLL_SECONDS)
        _look(ranks)


def blame(rank: EndedRank) -> tuple[bool, bool, int, int]:
    """Sorts failed ranks, likeliest cause first: no complaint about a peer, killed by a signal, first to go silent."""
    assert rank.status is not None
    last_words = tail(rank.log).splitlines()[-3:]
    follows = any(_LOST_PEER.search(line) for line in last_words)
    return follows, rank.status > 0, rank.log.stat().st_mtime_ns, rank.rank


# What NCCL's watchdog and gloo say of a collective that took too long.
_TIMED_OUT = ("Watchdog caught collective operation timeout", "Timed out waiting")
_WAITED = (
    "it waited in a collective for longer than run.timeout_minutes: the cause is a rank that did not come, whose log "
    "ends earlier than the others', or a limit that is too short for what that rank was doing"
)


def failure(culprit: EndedRank, world_size: int) -> WorldResult:
    """The result of a world in which this rank failed first, with its last words."""
    status = culprit.status
    assert status
    where = f" on {culprit.node}" if culprit.node else ""
    headline = f"rank {culprit.rank} of {world_size}{where} failed first ({_how(status)}); all ranks have ended"
    return WorldResult(status if status > 0 else 128 - status, culprit.rank, _with_last_words(headline, culprit.log))


def _undivided(error: NoRanksError, world_size: int) -> WorldResult:
    headline = f"the process that was to become {world_size} ranks ended before it did ({_how(error.status)})"
    code = (error.status or 1) if error.status >= 0 else 128 - error.status
    return WorldResult(code, message=_with_last_words(headline, error.log))


def _how(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"killed by {signal_name(-status)}"


def _with_last_words(headline: str, log: Path) -> str:
    words = tail(log)
    said = "\n".join(f"  | {line}" for line in words.splitlines()) or "  | (its log is empty)"
    hint = f"\n{_WAITED}" if any(sign in words for sign in _TIMED_OUT) else ""
    return f"{headline}\n{said}\nlog: {log}{hint}"


def signal_name(number: int) -> str:
    """SIGKILL and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _look(ranks: list[Rank]) -> None:
    """Note who has exited, without reaping: an unreaped leader keeps its process group's number from being reused."""
    for rank in ranks:
        if rank.status is None:
            found = os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                rank.status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _end(ranks: list[Rank], received: list[int], grace_seconds: float) -> None:
    """End and reap every rank with its children. Harmless when repeated."""
    living = [rank for rank in ranks if rank.process.returncode is None]
    _look(living)
    if any(rank.status is None for rank in living):
        _signal_groups(living, signal.SIGTERM)
        num_signals, deadline = len(received), time.monotonic() + grace_seconds
        while any(rank.status is None for rank in living):
            if time.monotonic() > deadline or len(received) > num_signals:
                break
            time.sleep(POLL_SECONDS)
            _look(living)
    _signal_groups(living, signal.SIGKILL)  # also what an ended rank left running in its group
    for rank in living:
        rank.process.wait()


def _signal_groups(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        # macOS says PermissionError where Linux says ProcessLookupError: only ended processes are left in the group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, number)
