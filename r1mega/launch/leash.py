"""`python leash.py PROGRAM ...`: runs a program that ends, with all it started, when who started it does.

However that comes: a launcher that is killed cannot end anybody. Linux tells this process, which leads the group. With
R1MEGA_GRACE the program has so many seconds to end by itself: one that reaches another machine takes the word there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the program, and end as it ends."""
    parent = int(os.environ["R1MEGA_LAUNCHER"])
    grace = float(os.environ.get("R1MEGA_GRACE", "0"))
    program: subprocess.Popen[bytes] | None = None

    def end_group(_number: int, _frame: FrameType | None) -> None:
        deadline = time.monotonic() + grace
        while program is not None and time.monotonic() < deadline:
            # Not program.poll(), which says nothing while program.wait() is under way.
            if os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.1)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end_group)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        return
    program = subprocess.Popen(sys.argv[1:])
    status = program.wait()
    if status < 0:
        if status != -signal.SIGKILL:  # which has no handler to take back
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
