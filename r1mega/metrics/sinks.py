"""Where metrics go: JSON lines, TensorBoard, Weights & Biases. Each satisfies `r1mega.types.Sink`."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from r1mega.metrics.history import METRICS_FILE, read_metrics
from r1mega.metrics.jsonl import JsonlWriter, split_nonfinite
from r1mega.types import Sink

TENSORBOARD_DIR = "tensorboard"
_RESERVED = ("update", "time", "nonfinite")


class JsonlSink:
    """One line per call: `{"update": int, "round": int, "time": seconds, ...metrics}`.

    `round` is taken from the metrics and is 0 in a run without rounds. `time` counts from the opening of the sink; an
    existing file is continued and its last time added, so that the clock of a resumed run does not fall back. NaN and
    infinity become null, their names listed under `nonfinite`.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic) -> None:
        target = Path(path)
        self._offset = max((r.get("time", 0.0) for r in read_metrics(target)), default=0.0) if target.exists() else 0.0
        self._writer = JsonlWriter(target)
        self._clock = clock
        self._start = clock()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. Raises ValueError where a metric has a reserved name (update, time, nonfinite)."""
        for name in _RESERVED:
            if name in metrics:
                raise ValueError(f"metric {name!r} is a name metrics.jsonl keeps for itself; rename the metric")
        seconds = self._offset + self._clock() - self._start
        values, nonfinite = split_nonfinite({name: float(value) for name, value in metrics.items() if name != "round"})
        record: dict[str, Any] = {"update": int(step), "round": int(metrics.get("round", 0)), "time": round(seconds, 3)}
        record |= values
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._writer.append(record)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class TensorBoardSink:
    """Scalars as TensorBoard event files, by TensorBoard's own writer: neither torch nor TensorFlow needed."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ValueError(
                "logger.tensorboard is on but tensorboard is not installed; "
                "run `pip install tensorboard` or set logger.tensorboard=false"
            ) from error
        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(os.fspath(directory))
        self._opened = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write every metric as a scalar at `step`."""
        if not self._opened:
            # Tells TensorBoard to drop what an interrupted run wrote at or after this step to the same directory.
            session = self._event.SessionLog(status=self._event.SessionLog.START)
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, session_log=session))
            self._opened = True
        values = [self._summary.Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        event = self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


@dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases settings. `mode` offline writes to the run directory alone and needs no account.

    `config` is shown with the run; `name` None lets wandb choose one.
    """

    project: str = "r1mega"
    name: str | None = None
    mode: str = "offline"
    config: Mapping[str, Any] | None = None


class WandbSink:
    """Logs to Weights & Biases. Raises ValueError where wandb is missing, or refuses to start (no account online)."""

    def __init__(self, directory: str | os.PathLike[str], options: WandbOptions) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                "logger.wandb is on but wandb is not installed; run `pip install wandb` or set logger.wandb=false"
            ) from error
        try:
            self._run = wandb.init(
                project=options.project,
                name=options.name,
                dir=os.fspath(directory),
                mode=options.mode,
                config=dict(options.config or {}),
            )
        except wandb.Error as error:
            raise ValueError(
                f"logger.wandb: wandb did not start in mode {options.mode} ({error}); "
                "run `wandb login` or set logger.wandb_mode=offline"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at `step`."""
        self._run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """End the wandb run."""
        self._run.finish()


class Sinks:
    """Several sinks as one; also a context manager. Every sink is closed even where closing another one fails."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._stack = ExitStack()
        for sink in self._sinks:
            self._stack.callback(sink.close)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write to every sink, in the order given."""
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Close every sink; further calls do nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(
    run_dir: str | os.PathLike[str], *, jsonl: bool = True, tensorboard: bool = False, wandb: WandbOptions | None = None
) -> Sinks:
    """The sinks asked for: `run_dir`/metrics.jsonl, `run_dir`/tensorboard/, and wandb with its files in `run_dir`.

    Where one cannot be opened those opened before it are closed. Raises ValueError naming what is not installed.
    """
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        opened: list[Sink] = []

        def keep(sink: Sink) -> None:
            stack.callback(sink.close)
            opened.append(sink)

        if jsonl:
            keep(JsonlSink(directory / METRICS_FILE))
        if tensorboard:
            keep(TensorBoardSink(directory / TENSORBOARD_DIR))
        if wandb is not None:
            keep(WandbSink(directory, wandb))
        stack.pop_all()
        return Sinks(opened)
