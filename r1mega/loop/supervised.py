"""What ends an update, and a run, that learns from given rows: supervised fine-tuning and reward models alike."""

from __future__ import annotations

from r1mega.loop.wire_supervised import RewardModelRun, SftRun
from r1mega.metrics.timer import as_metrics


def close_update(run: SftRun | RewardModelRun, metrics: dict[str, float], num_tokens: int) -> None:
    """Count the update and log what it was."""
    run.state.update += 1
    seconds = run.timer.finish_round()
    run.log.update(run.state, metrics | as_metrics(seconds) | {"perf/tokens_per_second": num_tokens / seconds["train"]})


def keep(run: SftRun | RewardModelRun) -> None:
    """Export and take a checkpoint where they are due."""
    state, every = run.state, run.config.export.every
    if every > 0 and state.update % every == 0:
        run.export(f"hf-{state.update:06d}")
    run.checkpoints.poll()
    if run.checkpoints.is_due(state):
        run.checkpoints.save(state, run.examples.state_dict(), run.log)


def finish(run: SftRun | RewardModelRun) -> None:
    """Export the final model, draw the curves, write the summary."""
    if run.config.export.hf:
        run.export("hf")
    run.log.finish(run.state)
