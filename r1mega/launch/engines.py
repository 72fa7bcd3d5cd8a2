"""SGLang servers of a run on this machine: started beside the training processes, watched, started again, ended.

A server that ends or does not answer for too long is started again, with the weights that were published last. The
training side finds it at the same address when it answers again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1mega.config.schema import Config
from r1mega.launch import leash
from r1mega.launch.ports import free_port
from r1mega.launch.supervise import signal_name, tail
from r1mega.rollout import server
from r1mega.rollout.engine_config import write_engine_config
from r1mega.weights import shelf

_POLL_SECONDS = 1.0
_PORT_TAKEN, _LOG_END = b"address already in use", 4096
_CHECK_SECONDS = 30.0  # SGLang's own health check takes up to 20


@dataclass(frozen=True)
class Limits:
    """Until a server first answers; between two answers; how often it is started again."""

    startup_seconds: float
    hang_seconds: float
    restarts: int


@dataclass
class EngineProcess:
    """One server: its process, its log, and when it last answered. Times are of time.monotonic().

    Args:
        command: the arguments to start it with, asked for anew at each start.
    """

    index: int
    url: str
    command: Callable[[], Sequence[str]]
    env: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    answered: float | None = None  # since this start
    log_start: int = 0  # where this start begins in the log
    starts: int = 0
    history: list[str] = field(default_factory=list)  # why it was started again

    def start(self) -> None:
        """Start the process in a group of its own; its output is added to the log."""
        with self.log.open("ab") as file:
            self.log_start = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, *self.command()],
                env={**os.environ, **self.env, "R1MEGA_LAUNCHER": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,
            )
        self.started, self.answered = time.monotonic(), None
        self.starts += 1

    def fault(self, limits: Limits, now: float) -> str | None:
        """What is wrong with it now, if anything."""
        assert self.process is not None
        status = self.process.poll()
        if status is not None:
            how = f"ended with exit code {status}" if status >= 0 else f"was killed by {signal_name(-status)}"
            return how if self.answered else f"{how} before it first answered"
        if self.answered is None:
            if self._found_port_taken():
                return "found its port taken"
            waited = now - self.started
            late = waited > limits.startup_seconds
            return f"has not answered {waited:.0f} s after its start (sglang.startup_seconds)" if late else None
        silent = now - self.answered
        return f"has not answered for {silent:.0f} s (sglang.hang_seconds)" if silent > limits.hang_seconds else None

    def _found_port_taken(self) -> bool:
        """Whether the log's end says so. SGLang 0.5.21 then neither serves nor ends."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - _LOG_END))
            return _PORT_TAKEN in file.read()

    def end(self) -> None:
        """End it and all it started. Harmless when repeated."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left, or on macOS none but ended ones
            os.killpg(self.process.pid, signal.SIGKILL)  # it has nothing to save, and takes 5 s for a SIGTERM
        self.process.wait()


class EngineFleet:
    """The servers of one run, as `supervise.run_world` has them beside the ranks.

    Args:
        place: where weights are published for them; removed at the end.
        scratch: their directory for temporary files, removed at the end: a killed server leaves its sockets there.
    """

    def __init__(
        self, engines: Sequence[EngineProcess], limits: Limits, place: shelf.Shelf, scratch: Path | None = None
    ) -> None:
        self.engines, self._limits, self._place, self._scratch = list(engines), limits, place, scratch
        self._stop = threading.Event()
        self._watchers: list[threading.Thread] = []

    def start(self) -> None:
        """Start all servers; they load while the training processes start."""
        for engine in self.engines:
            engine.start()
            watcher = threading.Thread(target=self._watch, args=(engine,), daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def look(self) -> str | None:
        """Start again what has ended or hangs. A message where the run has to end."""
        for engine in self.engines:
            fault = engine.fault(self._limits, time.monotonic())
            if fault is None:
                continue
            engine.end()
            engine.history.append(fault)
            never_answered = engine.answered is None and engine.starts == 1
            if never_answered or engine.starts > self._limits.restarts:
                return _last_words(engine, self._limits)
            print(f"r1mega: engine {engine.index} {fault}; starting it again; log: {engine.log}", file=sys.stderr)
            engine.start()
        return None

    def end(self) -> None:
        """End all servers. Harmless when repeated."""
        self._stop.set()
        for engine in self.engines:
            engine.end()
        self._place.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _watch(self, engine: EngineProcess) -> None:
        """Ask one server again and again whether it is well; each answer is a note of the time."""
        import httpx

        logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every call
        with httpx.Client(timeout=_CHECK_SECONDS, trust_env=False) as http:
            while not self._stop.wait(_POLL_SECONDS):
                start = engine.starts
                try:
                    is_well = http.get(f"{engine.url}/health").status_code == 200
                except httpx.HTTPError:
                    continue
                if is_well and engine.starts == start:
                    engine.answered = time.monotonic()


def _last_words(engine: EngineProcess, limits: Limits) -> str:
    said = "\n".join(f"  | {line}" for line in tail(engine.log).splitlines()) or "  | (its log is empty)"
    times = "" if engine.starts == 1 else f", after {engine.starts - 1} of {limits.restarts} restarts (sglang.restarts)"
    return f"engine {engine.index} at {engine.url} {engine.history[-1]}{times}\n{said}\nlog: {engine.log}"


def fleet_of(config: Config, log_dir: Path) -> EngineFleet:
    """The servers that `config` asks for, not yet started; writes what they and the trainer need to find each other."""
    sglang = config.sglang
    place = shelf.Shelf(shelf.folder_of(config.run.dir, sglang.weights_dir))
    place.prepare()
    tokenizer = Path(config.model.tokenizer) if config.model.tokenizer else None
    write_engine_config(Path(config.model.hf), place.model, tokenizer=tokenizer)
    ports: list[int] = []
    for _ in range(config.rollout.engines):
        ports.append(free_port(taken=ports))
    scratch = Path(tempfile.mkdtemp(prefix="r1mega-engines-"))  # not in the run directory: paths of sockets are short
    env = server.server_env(device=str(config.device.type), num_ranks=sglang.tp) | {"TMPDIR": str(scratch)}
    engines = []
    for index, port in enumerate(ports):
        engines.append(
            EngineProcess(
                index,
                f"http://127.0.0.1:{port}",
                lambda port=port: _command(config, place, port),
                env,
                log_dir / f"engine{index}.log",
            )
        )
    place.addresses.write_text(json.dumps([engine.url for engine in engines]), encoding="utf-8")
    limits = Limits(sglang.startup_seconds, sglang.hang_seconds, sglang.restarts)
    return EngineFleet(engines, limits, place, scratch)


def _command(config: Config, place: shelf.Shelf, port: int) -> list[str]:
    """With the weights published last, where there are any; without weights before the first publish."""
    sglang, newest = config.sglang, place.newest()
    return server.server_command(
        python=sglang.python,
        model_dir=place.model if newest is None else newest.path,
        host="127.0.0.1",
        port=port,
        device=str(config.device.type),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[str(sglang.dtype or config.precision.params)],
        max_running_requests=config.rollout.max_batch,
        mem_fraction=sglang.memory_fraction,
        max_total_tokens=sglang.cached_tokens(config.device.type),
        tp=sglang.tp,
        ep=sglang.ep,
        attn_dp=sglang.attn_dp,
        load_format="dummy" if newest is None else "auto",
        weight_version="none" if newest is None else str(newest.version),
        extra_args=sglang.extra_args,
    )
