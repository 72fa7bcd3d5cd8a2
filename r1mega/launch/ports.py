"""Ports on this machine for processes that are yet to start."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Collection


def free_port(taken: Collection[int] = ()) -> int:
    """A free port below those that systems give to outgoing connections, and none of `taken`.

    Seconds pass before somebody listens on it: a port of that kind may by then be in use by a connection of another
    run.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        if port in taken:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports from 20000 to 32767 is free")
