"""Engine ranks as processes that do with process groups what SGLang 0.5.21 does, and nothing else; and their servers.

`python engine_ranks.py RANK`: one rank, which reads commands as lines of JSON and answers each with a line. The steps
of `join` and `update` are those of SGLang's `srt/utils/common.py` (`init_custom_process_group`) and
`srt/model_executor/model_runner_components/weight_updater.py`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ANSWER_SECONDS = 60.0


class Rank:
    """The state of one engine rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.updates, self.dies_at, self.flips_at = 0, -1, -1

    def join(self, host: str, port: int, first_rank: int, size: int, name: str, backend: str) -> None:
        from torch.distributed import distributed_c10d as c10d

        timeout = timedelta(minutes=30)
        rank = first_rank + self.rank
        store, rank, size = next(c10d.rendezvous(f"tcp://{host}:{port}", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        group, _ = c10d._new_process_group_helper(
            size, rank, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=name, timeout=timeout
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        self.groups[name] = group

    def update(self, name: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        self.updates += 1
        if self.updates == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, dtype, shape in tensors}
        handles = [
            # gloo knows no FP8, of which NCCL moves bytes.
            dist.broadcast(
                tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor,
                src=0,
                group=self.groups[name],
                async_op=True,
            )
            for tensor in found.values()
        ]
        for handle in handles:
            handle.wait()
        if self.updates == self.flips_at:
            next(iter(found.values())).view(-1).view(torch.uint8)[5] ^= 1
        self.tensors |= found

    def leave(self, name: str) -> None:
        dist.destroy_process_group(self.groups.pop(name))

    def save(self, path: str) -> None:
        torch.save({name: tensor.clone() for name, tensor in self.tensors.items()}, path)

    def flip_at(self, update: int) -> None:
        self.flips_at = update

    def die_at(self, update: int) -> None:
        self.dies_at = update


def serve(rank: Rank) -> None:
    """Carry out commands until there are no more."""
    for line in sys.stdin:
        number, what, arguments = json.loads(line)
        fault = None
        try:
            getattr(rank, what)(*arguments)
        except (RuntimeError, KeyError) as error:
            fault = f"{type(error).__name__}: {error}"
        print(json.dumps([number, fault]), flush=True)


class EngineProcesses:
    """`r1mega.types.Servers` of such ranks. A rank that ends is started again, with its engine, by `begin_update`."""

    def __init__(self, fields: Any, engines: Sequence[Any], dtype: torch.dtype, folder: Path) -> None:
        self._fields, self._engines, self._dtype, self._folder = fields, list(engines), dtype, folder
        self.urls = [f"http://127.0.0.1:{index}" for index in range(len(engines))]
        self._number = self.joins = self.updates = 0
        self._versions = ["default"] * len(engines)
        self._ranks = [[self._start(rank) for rank in range(engine.num_ranks)] for engine in engines]

    def _start(self, rank: int) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        # No PR_SET_PDEATHSIG: the end of its input ends it.
        return subprocess.Popen([sys.executable, __file__, str(rank)], stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def restart(self, engine: int) -> None:
        for process in self._ranks[engine]:
            process.kill()
            process.wait()
        self._ranks[engine] = [self._start(rank) for rank in range(self._engines[engine].num_ranks)]
        self._versions[engine] = "default"

    def die_at(self, engine: int, update: int) -> None:
        self._ask({engine: ["die_at", update]})

    def flip_at(self, engine: int, update: int) -> None:
        self._ask({engine: ["flip_at", update]})

    def end(self) -> None:
        for process in (process for ranks in self._ranks for process in ranks):
            process.kill()
            process.wait()

    def begin_update(self) -> None:
        for engine, ranks in enumerate(self._ranks):
            if any(process.poll() is not None for process in ranks):
                self.restart(engine)

    def end_update(self, version: int) -> None:
        self._versions = [str(version)] * len(self._engines)

    def weight_versions(self) -> list[str]:
        return self._versions

    def join_group(self, address: Any, first_ranks: Sequence[int]) -> None:
        self.joins += 1
        host, port, size, name, backend = address.host, address.port, address.size, address.name, address.backend
        self._ask({i: ["join", host, port, first, size, name, backend] for i, first in enumerate(first_ranks)})

    def leave_groups(self, names: Sequence[str]) -> None:
        from r1mega.types import EngineFault

        for engine in range(len(self._engines)):
            for name in names:
                try:
                    self._ask({engine: ["leave", name]})
                except EngineFault as error:
                    print(f"did not leave: {error}", file=sys.stderr)

    def update_from_group(self, name: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        self.updates += 1
        self._ask({engine: ["update", name, tensors] for engine in range(len(self._engines))})

    def received(self) -> list[list[dict[str, torch.Tensor]]]:
        """[engine][rank]: all tensors it has."""
        found = []
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            for engine in range(len(self._engines)):
                paths = [f"{folder}/{engine}-{rank}" for rank in range(len(self._ranks[engine]))]
                for rank, path in enumerate(paths):
                    self._ask({engine: ["save", path]}, only=rank)
                found.append([torch.load(path) for path in paths])
        return found

    def checksums(self) -> list[dict[str, Any]]:
        """Of what was received, as SGLang would report them."""
        from r1mega.models.fp8_blocks import SCALE_SUFFIX, dequantize
        from r1mega.weights.checksums import ExpectedChecksums
        from r1mega.weights.engine_params import EngineBuild, engine_params

        answers = []
        for layout, ranks in zip(self._engines, self.received(), strict=True):
            entries = []
            for rank, tensors in enumerate(ranks):
                params = engine_params(self._fields, layout, rank, EngineBuild(device="cpu"))
                hashes = ExpectedChecksums(params, dtype=self._dtype, device="cpu")
                for name, tensor in tensors.items():
                    scale = tensors.get(name + SCALE_SUFFIX)
                    if not name.endswith(SCALE_SUFFIX):
                        # Of FP8 blocks SGLang hashes the weights that they stand for.
                        hashes.add(name, tensor if scale is None else dequantize(tensor, scale))
                info = [{"role": "target", "rank": rank}]
                entries.append({"parallelism_info": info, "checksums": hashes.result()})
            answers.append({"success": True, "ranks": entries})
        return answers

    def _ask(self, commands: dict[int, list[Any]], only: int | None = None) -> None:
        """Have engines do something, all their ranks at once. Raises EngineUnavailable as soon as one rank fails."""
        from r1mega.types import EngineUnavailable

        self._number += 1
        asked = [
            process for engine in commands for rank, process in enumerate(self._ranks[engine]) if only in (None, rank)
        ]
        with selectors.DefaultSelector() as waiting:
            for engine, command in commands.items():
                what, *arguments = command
                for process in self._ranks[engine]:
                    if process in asked:
                        try:
                            process.stdin.write(json.dumps([self._number, what, arguments]) + "\n")
                        except BrokenPipeError:
                            raise EngineUnavailable(f"{self.urls[engine]}: gone") from None
                        waiting.register(process.stdout, selectors.EVENT_READ, engine)
            deadline = time.monotonic() + ANSWER_SECONDS
            while waiting.get_map():
                ready = waiting.select(timeout=max(deadline - time.monotonic(), 0))
                if not ready:
                    raise EngineUnavailable(f"no answer within {ANSWER_SECONDS:g} s")
                for key, _ in ready:
                    line = key.fileobj.readline()
                    number, fault = json.loads(line) if line else (self._number, "ended")
                    if number < self._number:
                        continue  # an answer that nobody waited for
                    waiting.unregister(key.fileobj)
                    if fault:
                        raise EngineUnavailable(f"{self.urls[key.data]}: {fault}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # SGLang's own
    serve(Rank(int(sys.argv[1])))
