"""Real servers as a run has them: the launcher's fleet, looked after, and the trainer's side of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from r1mega.config import choices, schema
from r1mega.launch.engine_process import EngineProcess
from r1mega.launch.engines import EngineFleet, fleet_of
from r1mega.models import hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.models.tables import slots_of
from r1mega.parallel.layout import Layout
from r1mega.rollout.sglang import SglangEngines
from r1mega.weights.disk import DiskPublisher
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.proof import PublishProof, build_of
from r1mega.weights.shelf import Shelf, folder_of
from r1mega.weights.spread import SpreadWriter
from r1mega.weights.write_plan import WritePlan

sys.path.insert(0, str(Path(__file__).parent))
from where import DEVICE, need_gpus


class Servers:
    """A fleet that a thread of its own looks after, as the launcher does. `fault` is what would have ended the run."""

    def __init__(self, config: schema.Config) -> None:
        self.config = config
        self.log_dir = Path(config.run.dir) / "logs"
        self.log_dir.mkdir(parents=True)
        self.fleet: EngineFleet = fleet_of(config, self.log_dir)
        self.place = Shelf(folder_of(config.run.dir, config.sglang.weights_dir))
        self.fault: str | None = None
        self._done = threading.Event()
        # The servers are children of this thread: they would end with it.
        self._thread = threading.Thread(target=self._look_after)

    @property
    def engines(self) -> list[EngineProcess]:
        return self.fleet.engines

    def client(self, *, through_router: bool = False, **options) -> SglangEngines:
        if through_router:
            assert self.fleet.router is not None, "set sglang__router"
            options["router_url"] = self.fleet.router.url
        options = {"max_in_flight": 64, "patience_seconds": 200.0} | options
        return SglangEngines([engine.url for engine in self.engines], **options)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look_after(self) -> None:
        try:
            self.fleet.start()
            while not self._done.wait(0.05) and self.fault is None:
                self.fault = self.fleet.look()
        finally:
            self.fleet.end()


def schedulers(engine: EngineProcess) -> list[psutil.Process]:
    """The processes of a server that hold the model."""
    assert engine.process is not None
    children = psutil.Process(engine.process.pid).children(recursive=True)
    return [child for child in children if "scheduler" in "".join(child.cmdline()) + child.name()]


def served(engine: EngineProcess) -> int:
    """Sequences asked of a server so far, its former starts included."""
    return engine.log.read_bytes().count(b'"POST /generate HTTP')


def kill(engine: EngineProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to all processes of a server."""
    assert engine.process is not None
    os.killpg(engine.process.pid, number)


@contextmanager
def servers(checkpoint: Path, run_dir: Path, python: Path, **options) -> Iterator[Servers]:
    """Two servers of a checkpoint's model in fp32, without weights; `options` as SECTION__FIELD=value.

    Their start is awaited by nobody.
    """
    config = schema.Config()
    config.run.dir, config.model.hf = str(run_dir), str(checkpoint)
    config.device.type, config.precision.params = choices.DeviceType(DEVICE), choices.ParamDtype.fp32
    config.rollout.engine, config.rollout.engines = choices.EngineKind.sglang, 2
    config.rollout.max_batch = 64
    config.sglang.python, config.sglang.max_cached_tokens = str(python), 16384
    for name, value in options.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    need_gpus(config.rollout.engines * config.sglang.tp)
    made = Servers(config)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def disk_publisher(
    fleet: Servers, client: SglangEngines, fields: HfFields, layout: EngineLayout, group: dist.ProcessGroup, share=1.0
) -> DiskPublisher:
    """What publishes in fp32 from a trainer of one process."""
    proof = PublishProof(fields, layout, build_of(DEVICE, ()), torch.float32, share)
    plan = WritePlan(fields, Layout.parse("1"), serves="fp32", held="fp32", together=proof.together())
    writer = SpreadWriter(plan, 0, torch.device("cpu"), fleet.place.model, group)
    return DiskPublisher(fleet.place, client, writer, proof, group)


def exporting(checkpoint: Path):
    """The weights of a trainer that holds a checkpoint's tensors."""
    tensors = load_file(checkpoint / "model.safetensors")
    shards = [
        (slot, 0, slot.op.to_megatron([tensors[tensor.name] for tensor in slot.tensors], 0, 1))
        for slot in slots_of(hf_fields.read(checkpoint))
        if not slot.is_copy
    ]
    return SimpleNamespace(
        export_hf=lambda *, wanted: iter(tensors.items() if wanted else ()), shards=lambda: list(shards)
    )
