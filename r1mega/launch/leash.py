"""`python leash.py PROGRAM ...`: runs a program that ends, with all it started, when who started it does.

However that comes: a launcher that is killed cannot end anybody. Linux tells this process, which leads the group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the program, and end as it ends."""
    parent = int(os.environ["R1MEGA_LAUNCHER"])
    signal.signal(signal.SIGTERM, _end_group)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        return
    status = subprocess.Popen(sys.argv[1:]).wait()
    if status < 0:
        if status != -signal.SIGKILL:  # which has no handler to take back
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _end_group(_number: int, _frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
