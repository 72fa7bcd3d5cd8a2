"""What a run tells people: the display, the metric files, samples, curves, summary. Only rank 0 writes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega.config.schema import Config
from r1mega.loop.state import RunState
from r1mega.metrics.console import Console
from r1mega.metrics.history import METRICS_FILE, read_metrics
from r1mega.metrics.jsonl import JsonlWriter
from r1mega.metrics.sinks import Sinks, WandbOptions, open_sinks
from r1mega.metrics.summary import summarize_metrics, write_summary
from r1mega.metrics.timer import as_metrics
from r1mega.types import SampleGroup

LOG_FILES = (METRICS_FILE, "samples.jsonl")


def rewind(run_dir: Path | str, position: Mapping[str, int]) -> None:
    """Cut the logs back to where they stood at a checkpoint: a resumed run writes the rest again."""
    for name in LOG_FILES:
        path = Path(run_dir) / name
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(position.get(name, 0))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class RunLog:
    """The console, the metric sinks and the samples of one run. On ranks other than 0 every call does nothing.

    `round_metrics` collects numbers of the round while it runs; they go out with its last update.
    """

    def __init__(
        self,
        config: Config,
        *,
        enabled: bool,
        model: str,
        layout: str,
        world_size: int,
        total_updates: int,
    ) -> None:
        self.console = Console("", 0, enabled=False)
        self.round_metrics: dict[str, float] = {}
        self._config, self._enabled, self._total = config, enabled, total_updates
        self._facts = {"model": model, "layout": layout, "world_size": world_size, "seed": config.run.seed}
        self._started = time.monotonic()
        self._last: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._sinks: Sinks | None = None
        self._samples: JsonlWriter | None = None
        self._dir = Path(config.run.dir)
        if enabled:
            self._open()

    def _open(self) -> None:
        config, logger = self._config, self._config.logger
        details = {"model": self._facts["model"], "layout": self._facts["layout"], "device": str(config.device.type)}
        details["seed"] = str(config.run.seed)
        self.console = Console(config.run.name, self._total, enabled=logger.console, details=details)
        wandb = None
        if logger.wandb:
            wandb = WandbOptions(project=logger.wandb_project, name=config.run.name, mode=str(logger.wandb_mode))
        self._sinks = open_sinks(self._dir, jsonl=logger.jsonl, tensorboard=logger.tensorboard, wandb=wandb)
        self._samples = JsonlWriter(self._dir / "samples.jsonl")

    def update(self, state: RunState, metrics: dict[str, float]) -> None:
        """One update is done. Its line is written when the next begins, or with the round's numbers at its end."""
        if not self._enabled:
            return
        self._flush()
        self._last = {"update": state.update, "round": state.round} | metrics
        self.console.update(state.update, state.round, metrics)

    def evaluation(self, state: RunState, metrics: dict[str, float]) -> None:
        """Numbers of an evaluation: with the last update's line, or on a line of their own before the first update."""
        if not self._enabled:
            return
        if not self._last:
            self._last = {"update": state.update, "round": state.round}
        self._last |= metrics
        if state.update == 0:
            self._flush()
        self.console.update(state.update, state.round, metrics)

    def close_round(
        self, state: RunState, metrics: dict[str, float], seconds: Mapping[str, float], tokens: int
    ) -> None:
        """The round's numbers join the line of its last update."""
        if not self._enabled:
            return
        spent = sum(value for name, value in seconds.items() if name != "evaluate")
        values = (
            metrics | self.round_metrics | as_metrics(seconds) | {"perf/tokens_per_second": tokens / max(spent, 1e-9)}
        )
        self.round_metrics = {}
        self._last |= values
        self._flush()
        self.console.update(state.update, state.round, values, dict(seconds))

    def samples(self, state: RunState, groups: Sequence[SampleGroup], *, split: str, limit: int) -> None:
        """Write some samples: of training one a group, spread over the round; of evaluation always the same
        questions."""
        if not self._enabled or limit <= 0:
            return
        every = max(1, len(groups) // limit)
        chosen = groups[::every][:limit] if split == "train" else groups[:limit]
        for group in chosen:
            sample, score = group.samples[0], group.samples[0].score
            self._samples.append(
                {
                    "update": state.update,
                    "round": state.round,
                    "split": split,
                    "prompt_id": sample.prompt_id,
                    "question": group.prompt.question,
                    "answer": group.prompt.answer,
                    "text": sample.text,
                    "reward": score.value,
                    "parts": score.parts,
                    "error": score.error,
                    "finish_reason": str(sample.finish_reason),
                    "num_tokens": len(sample.token_ids),
                    "weight_version": sample.weight_version,
                    "spans": [[span.weight_version, span.start, span.end] for span in sample.spans],
                }
            )

    def position(self) -> dict[str, int]:
        """Bytes of each log after everything held back is written: what a resumed run keeps of them."""
        self._flush()
        return {name: _size(self._dir / name) for name in LOG_FILES}

    def latest(self) -> dict[str, float]:
        """The last finite value of each metric."""
        return dict(self._latest)

    def finish(self, state: RunState) -> None:
        """Close the files, write summary.json and draw the curves."""
        if not self._enabled:
            return
        self._flush()
        self.close()
        if not self._config.logger.jsonl:
            return
        metrics = read_metrics(self._dir / "metrics.jsonl")
        seconds = time.monotonic() - self._started
        write_summary(
            self._dir, summarize_metrics(metrics) | self._facts | {"updates": state.update, "seconds": seconds}
        )
        from r1mega.metrics.plots import plot_run  # matplotlib, which every other rank and every start does without

        for path in plot_run(self._dir):
            print(f"wrote {path}")

    def close(self) -> None:
        """Give the terminal back and close the sinks; safe to call twice."""
        self.console.close()
        if self._sinks is not None:
            self._sinks.close()
            self._samples.close()
            self._sinks = None

    def _flush(self) -> None:
        if self._last:
            self._latest |= {name: value for name, value in self._last.items() if math.isfinite(value)}
            step = int(self._last.pop("update"))
            self._sinks.write(step, self._last)
            self._last = {}
