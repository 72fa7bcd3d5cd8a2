"""Servers that answer to /health alone, and what tests ask of their processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from r1mega.launch.engine_process import EngineProcess
from r1mega.launch.engines import EngineFleet

# Answers /health on the port; what it does besides stands before.
SERVER = """
import http.server, os, signal, subprocess, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print('started', os.getpid(), *sys.argv[2:], flush=True)
{first}
http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""


def until(condition: Callable[[], object], fleet: EngineFleet | None = None, seconds: float = 20.0) -> None:
    """Look after the fleet until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come to it in time"
        assert fleet is None or fleet.look() is None
        time.sleep(0.02)


def pid(process: EngineProcess) -> int:
    assert process.process is not None
    return process.process.pid


def has_ended(process: EngineProcess) -> bool:
    assert process.process is not None
    return process.process.poll() is not None


def is_gone(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
