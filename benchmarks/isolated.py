"""Runs a system under test in a process of its own, so that none sees what another does to torch.

r1mega, for one, answers for CUDA on the CPU by wrapping torch's tensor factories, which would slow its neighbour down.
While one system takes a step the others' processes sleep on a pipe.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.measured_command import high_water_bytes
from benchmarks.workload import Peer, StepReport

# Where each system's peer stands; imported only when asked for, as TRL need not be installed.
PEERS = {"r1mega": ("benchmarks.r1mega_peer", "R1megaPeer"), "trl": ("benchmarks.trl_peer", "TrlPeer")}


def _serve(connection: Connection, system: str, arguments: dict[str, Any]) -> None:
    """The child's life: build the peer, then one step for every True that comes, until False."""
    try:
        module, name = PEERS[system]
        peer: Peer = getattr(import_module(module), name)(**arguments)
        torch.set_num_threads(arguments["threads"])
        try:
            connection.send(None)
            while connection.recv():
                connection.send(peer.step())
        finally:
            peer.close()
        connection.send(peak_memory())
    except Exception:
        connection.send(RuntimeError(f"{system} failed in its own process:\n{traceback.format_exc()}"))


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which is on Linux that of whoever started this program where that was larger.
    return high_water_bytes()


class IsolatedPeer:
    """One system of `PEERS` in its own process, with the interface of `benchmarks.workload.Peer`.

    `arguments` are the peer's constructor's. `peak_memory` is the child's largest resident size in bytes, 0 before
    `close`. Raises RuntimeError with the child's traceback where the child fails.
    """

    def __init__(self, system: str, arguments: dict[str, Any]) -> None:
        self.name = system
        self.peak_memory = 0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, system, arguments), name=system, daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with exit code {self._process.exitcode}") from None
        if isinstance(message, RuntimeError):
            self._process.join()
            raise message
        return message

    def step(self) -> StepReport:
        """Let the child take one step; the time is the child's own."""
        self._connection.send(True)
        return self._receive()

    def close(self) -> None:
        """End the child, having asked for its peak memory."""
        if self._process.is_alive():
            self._connection.send(False)
            self.peak_memory = self._receive()
        self._process.join()
        self._connection.close()
