"""SGLang servers of a run, and their router: started beside the training processes, watched, started again, ended.

A server that ends or does not answer for too long is started again, with the weights that were published last. The
training side finds it at the same address when it answers again.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from r1mega.config.choices import EngineDtype
from r1mega.config.schema import Config
from r1mega.launch import far_leash
from r1mega.launch.engine_process import EngineProcess, Limits, NodeProcess
from r1mega.launch.placement import Place, place
from r1mega.launch.ports import free_port
from r1mega.launch.supervise import tail
from r1mega.loop.wire_publish import server_options
from r1mega.rollout import server
from r1mega.rollout.engine_config import write_engine_config
from r1mega.weights import shelf

_POLL_SECONDS = 1.0
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}  # FP8 blocks compute in bf16
_CHECK_SECONDS = 30.0
_ROUTER_STARTUP_SECONDS, _ROUTER_HANG_SECONDS = 300.0, 60.0  # it loads nothing, and its health check asks nobody


class EngineFleet:
    """The servers of one run, as `supervise.run_world` has them beside the ranks.

    Args:
        place: where weights are published for them; removed at the end.
        scratch: their directory for temporary files, removed at the end: a killed server leaves its sockets there.
        router: what stands before them, if anything does.
    """

    def __init__(
        self,
        engines: Sequence[EngineProcess],
        place: shelf.Shelf,
        scratch: Path | None = None,
        router: EngineProcess | None = None,
    ) -> None:
        self.engines, self.router = list(engines), router
        self._place, self._scratch = place, scratch
        self._stop = threading.Event()
        self._watchers: list[threading.Thread] = []

    @property
    def _all(self) -> list[EngineProcess]:
        return self.engines + ([self.router] if self.router is not None else [])

    def start(self) -> None:
        """Start all servers; they load while the training processes start."""
        for engine in self._all:
            engine.start()
            watcher = threading.Thread(target=self._watch, args=(engine,), daemon=True)
            watcher.start()
            self._watchers.append(watcher)
        self._tell_processes()

    def _tell_processes(self) -> None:
        self._place.set_processes([engine.process.pid for engine in self.engines if engine.process is not None])

    def look(self) -> str | None:
        """Start again what has ended or hangs, in the trainer's turn not before that is over. A message where the run
        has to end."""
        self._beat()
        for engine in self._all:
            fault = engine.due or engine.fault(time.monotonic())
            if fault is None:
                continue
            engine.end()
            self._beat()  # to end one that is out of reach takes long
            engine.due = fault if engine.answered and self._place.is_trainers_turn else None
            if engine.due:
                continue
            engine.history.append(fault)
            never_answered = engine.answered is None and engine.starts == 1
            if never_answered or engine.starts > engine.limits.restarts:
                return _last_words(engine)
            print(f"r1mega: {engine.name} {fault}; starting it again; log: {engine.culprit.log}", file=sys.stderr)
            engine.start()
            self._tell_processes()
        return None

    def end(self) -> None:
        """End all servers. Harmless when repeated."""
        self._stop.set()
        for engine in self._all:
            for node in engine.nodes:
                node.tell_to_end()
        for engine in self._all:
            engine.end()
        self._place.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _beat(self) -> None:
        for engine in self._all:
            engine.beat()

    def _watch(self, engine: EngineProcess) -> None:
        """Ask one server again and again whether it is well; each answer is a note of the time.

        None of the questions makes it generate, so it is watched as well while its memory is given back.
        """
        import httpx

        logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every call
        with httpx.Client(timeout=_CHECK_SECONDS, trust_env=False) as http:
            while not self._stop.wait(_POLL_SECONDS):
                start = engine.starts
                try:
                    is_well = all(http.get(engine.url + path).status_code == 200 for path in engine.questions)
                except httpx.HTTPError:
                    continue
                if is_well and engine.starts == start:
                    engine.answered = time.monotonic()


def _last_words(engine: EngineProcess) -> str:
    log, restarts = engine.culprit.log, engine.limits.restarts
    said = "\n".join(f"  | {line}" for line in tail(log).splitlines()) or "  | (its log is empty)"
    times = "" if engine.starts == 1 else f", after {engine.starts - 1} of {restarts} restarts (sglang.restarts)"
    return f"{engine.name} at {engine.url} {engine.history[-1]}{times}\n{said}\nlog: {log}"


def fleet_of(config: Config, log_dir: Path) -> EngineFleet:
    """The servers that `config` asks for, not yet started; writes what they and the trainer need to find each other."""
    sglang = config.sglang
    books = shelf.Shelf(shelf.folder_of(config.run.dir, sglang.weights_dir))
    books.prepare()
    tokenizer = Path(config.model.tokenizer) if config.model.tokenizer else None
    write_engine_config(Path(config.model.hf), books.model, tokenizer=tokenizer, fp8=sglang.dtype is EngineDtype.fp8)
    places = place(
        config.rollout.engines,
        nodes=sglang.nodes_per_engine,
        ranks_per_node=sglang.tp // sglang.nodes_per_engine,
        hosts=sglang.hosts,
        first_port=sglang.first_port,
        first_gpu=sglang.first_gpu,
        free_port=free_port,
    )
    scratch = Path(tempfile.mkdtemp(prefix="r1mega-engines-"))  # not in the run directory: paths of sockets are short
    limits = Limits(sglang.startup_seconds, sglang.hang_seconds, sglang.restarts)
    engines = []
    for index, where in enumerate(places):
        nodes = [_node(config, books, where, index, rank, log_dir, scratch) for rank in range(len(where.seats))]
        engines.append(EngineProcess(f"engine {index}", where.url, nodes, limits))
    urls = [engine.url for engine in engines]
    router = _router(config, urls, log_dir) if sglang.router else None
    books.write_addresses(shelf.Addresses(urls, router.url if router is not None else None))
    return EngineFleet(engines, books, scratch, router)


def _node(
    config: Config, books: shelf.Shelf, where: Place, index: int, rank: int, log_dir: Path, scratch: Path
) -> NodeProcess:
    """What runs on one node of a server."""
    sglang, seat = config.sglang, where.seats[rank]
    first_rank = rank * sglang.tp // len(where.seats)
    env = server.server_env(device=str(config.device.type), num_ranks=sglang.tp, first_rank=first_rank)
    name = f"engine{index}" if len(where.seats) == 1 else f"engine{index}-node{rank}"
    log = log_dir / f"{name}.log"
    if seat.host is None:
        env |= {"TMPDIR": str(scratch)}
        return NodeProcess(lambda: _command(config, books, where, rank), env, log)
    return NodeProcess(
        lambda: _far_command(config, books, seat.name, name, env, _command(config, books, where, rank)),
        {},
        log,
        is_far=True,
    )


def _far_command(
    config: Config, books: shelf.Shelf, host: str, name: str, env: dict[str, str], command: Sequence[str]
) -> list[str]:
    """What starts a command on another host.

    The command stands in a script beside the weights: of what ssh and srun carry to another machine, neither quotes nor
    environment variables arrive alike.
    """
    assert config.sglang.remote is not None, "check_engines asks for it"
    python = shutil.which(config.sglang.python)
    assert python is not None, "check_engines asks for it"
    leash, script = books.folder / "far_leash.py", books.folder / f"{name}.sh"
    shutil.copyfile(far_leash.__file__, leash)
    settings = [f"{key}={value}" for key, value in env.items()]
    words = ["exec", "env", *settings, os.path.abspath(python), "-I", str(leash), *command]
    script.write_text("#!/bin/sh\n" + shlex.join(words) + "\n", encoding="utf-8")
    prefix = [word.replace("{host}", host) for word in shlex.split(config.sglang.remote)]
    return [*prefix, "/bin/sh", str(script)]


def _router(config: Config, urls: Sequence[str], log_dir: Path) -> EngineProcess:
    """The router on this machine, which the servers' URLs are known to."""
    sglang, host = config.sglang, "127.0.0.1"
    port = free_port()
    metrics_port = free_port(taken=[port])
    command = server.router_command(
        python=sglang.python,
        host=host,
        port=port,
        metrics_port=metrics_port,
        urls=urls,
        policy=str(sglang.router_policy),
        startup_seconds=sglang.startup_seconds * (sglang.restarts + 1),
    )
    limits = Limits(_ROUTER_STARTUP_SECONDS, _ROUTER_HANG_SECONDS, sglang.restarts)
    node = NodeProcess(lambda: command, {"PYTHONPATH": ""}, log_dir / "router.log")
    return EngineProcess("router", f"http://{host}:{port}", [node], limits, questions=("/health",))


def _command(config: Config, books: shelf.Shelf, where: Place, rank: int) -> list[str]:
    """With the weights published last, where there are any; without weights before the first publish."""
    sglang, newest, seat = config.sglang, books.newest(), where.seats[rank]
    return server.server_command(
        python=sglang.python if seat.host is None else os.path.abspath(shutil.which(sglang.python) or sglang.python),
        model_dir=books.model if newest is None else newest.path,
        host="127.0.0.1" if seat.host is None else "0.0.0.0",
        port=seat.port,
        device=str(config.device.type),
        dtype=_DTYPES[str(sglang.dtype or config.precision.params)],
        max_running_requests=config.rollout.max_batch,
        mem_fraction=sglang.memory_fraction,
        max_total_tokens=sglang.cached_tokens(config.device.type),
        tp=sglang.tp,
        ep=sglang.ep,
        attn_dp=sglang.attn_dp,
        part=server.Part(len(where.seats), rank, where.rendezvous, seat.first_gpu),
        load_format="dummy" if newest is None else "auto",
        weight_version="none" if newest is None else str(newest.version),
        options=server_options(config),
        extra_args=sglang.extra_args,
    )
