"""The training processes of a Slurm job: one step over its machines, watched by what each rank reports."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1mega.launch.rank_processes import EndedRank
from r1mega.launch.slurm_rank import ENDED, STARTED
from r1mega.launch.supervise import SETTLE_SECONDS, Companions, WorldResult, blame, failure, tail
from r1mega.loop.stop import STOPPED

POLL_SECONDS = 1.0
_SETTLE_SECONDS = 4 * SETTLE_SECONDS  # reports come over a shared file system
_END_SECONDS = 20.0  # srun waits 12 s for tasks that it has killed
_LATE_SECONDS = 5.0  # a report may be seen after srun's end
_REPORT = re.compile(re.escape(ENDED).replace(r"\{\}", r"(\d+)"))
_SHOWN = 8


@dataclass
class World:
    """One start of the ranks.

    Args:
        command: srun with all that it starts.
        size: number of ranks.
        folder: where they report (r1mega.launch.slurm_rank).
        log_dir: rankN.log of each, and srun.log.
    """

    command: Sequence[str]
    size: int
    folder: Path
    log_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, beside: Companions | None = None) -> WorldResult:
        """Start them and wait for all; `beside` are other processes of the run. Whatever comes, none is left."""
        log = self.log_dir / "srun.log"
        with log.open("ab") as output:
            step: subprocess.Popen[bytes] | None = None
            try:
                if beside is not None:
                    beside.start()
                step = subprocess.Popen(
                    self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
                )
                return self._watch(step, log, beside)
            finally:
                if step is not None:
                    _end(step)
                if beside is not None:
                    beside.end()

    def _watch(self, step: subprocess.Popen[bytes], log: Path, beside: Companions | None) -> WorldResult:
        while True:
            code = step.poll()
            ended = self._ended()
            if any(rank.has_failed for rank in ended):
                time.sleep(_SETTLE_SECONDS)
                culprit = min((rank for rank in self._ended() if rank.has_failed), key=blame)
                _end(step)
                return failure(culprit, self.size)
            if code is not None:
                return self._after(code, log)
            message = beside.look() if beside is not None else None
            if message is not None:
                _end(step)
                return WorldResult(1, message=f"{message}\nall {self.size} ranks have ended")
            time.sleep(POLL_SECONDS)

    def _after(self, code: int, log: Path) -> WorldResult:
        """srun has ended, and no rank has said that it failed."""
        deadline = time.monotonic() + _LATE_SECONDS
        while len(ended := self._ended()) < self.size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        failed = [rank for rank in ended if rank.has_failed]
        if failed:
            return failure(min(failed, key=blame), self.size)
        if len(ended) == self.size and any(rank.status == STOPPED for rank in ended):
            return WorldResult(STOPPED)
        if len(ended) == self.size and code == 0:
            return WorldResult(0)
        silent = sorted(set(range(self.size)) - {rank.rank for rank in ended})
        return WorldResult(code or 1, message=self._silence(silent, log))

    def _silence(self, silent: Sequence[int], log: Path) -> str:
        """What is known of ranks that have ended without a report."""
        where = []
        for rank in silent[:_SHOWN]:
            node = self._node(rank)
            where.append(f"{rank} ({f'on {node}' if node else 'never started'})")
        more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
        said = "\n".join(f"  | {line}" for line in tail(log).splitlines())
        ranks = f"ranks {', '.join(where)}{more} of {self.size} ended without a word" if silent else "srun failed"
        return f"{ranks}\n{said}\nlog: {log}"

    def _ended(self) -> list[EndedRank]:
        found = []
        for path in self.folder.iterdir():
            match = _REPORT.fullmatch(path.name)
            if match:
                rank = int(match[1])
                log = self.log_dir / f"rank{rank}.log"
                found.append(EndedRank(rank, int(path.read_text()), log, node=self._node(rank)))
        return found

    def _node(self, rank: int) -> str | None:
        """The machine that a rank said it was on."""
        path = self.folder / STARTED.format(rank)
        return path.read_text(encoding="utf-8") if path.exists() else None


def _end(step: subprocess.Popen[bytes]) -> None:
    """srun kills its tasks on a SIGTERM. Harmless when repeated."""
    if step.poll() is not None:
        return
    step.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        step.wait(_END_SECONDS)
        return
    print("r1mega: srun does not end; the job's end will end its tasks", file=sys.stderr)
    step.kill()
    step.wait()
