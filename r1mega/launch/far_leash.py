"""`python far_leash.py PROGRAM ...`: on another machine, runs a program that ends when its launcher does.

A launcher that ends closes this program's standard input, which ssh and srun pass on; one whose machine or network is
gone falls silent on it. Either ends the program with all it started. A copy of this file lies beside the weights, since
the other machine need not have this package: it needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SILENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5


def main() -> int:
    """Run the program; its exit code, or 128 + the signal that killed it."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # Deaf where Slurm sends SIGTERM to ask for a checkpoint, for which the servers are still needed.
        is_deaf = number == signal.SIGTERM and os.environ.get("R1MEGA_DEAF") == "1"
        signal.signal(number, signal.SIG_IGN if is_deaf else _stop)
    scratch = tempfile.mkdtemp(prefix="r1mega-engine-")  # a killed server leaves its sockets there
    program = None
    try:
        program = subprocess.Popen(
            sys.argv[1:], stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": scratch}, start_new_session=True
        )
        return _wait(program)
    finally:
        if program is not None:
            _end(program)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait(program: subprocess.Popen) -> int:
    """Until the program ends, or the launcher is gone."""
    heard = time.monotonic()
    while True:
        status = program.poll()
        if status is not None:
            return status if status >= 0 else 128 - status
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if readable:
            if not os.read(0, 4096):
                return 0
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            print(f"far_leash: heard nothing for {SILENCE_SECONDS:g} s; ending", file=sys.stderr)
            return 1


def _end(program: subprocess.Popen) -> None:
    """End the program and all it started, which may live on when it has ended."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
