"""Weights from the trainer to the engines, and the proof that the engines compute with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1mega.train.batch import PackItem
from r1mega.weights.proof import publish_twice

if TYPE_CHECKING:
    from r1mega.loop.wire import RlRun


def deliver(run: RlRun) -> dict[str, float]:
    """Publish the policy under the count of updates, and let the engines generate with it; metrics of the probe.

    Collective. Raises PublishError on every rank where checksums or log-probs show other weights twice in a row.
    """
    publish_twice(lambda: _once(run), run.state.update, speaks=run.groups.rank == 0)
    return dict(run.probe.metrics) if run.probe else {}


def _once(run: RlRun) -> list[str]:
    run.turns.both()
    run.publish(run.policy, run.state.update)
    if run.probe is None:
        run.turns.engines()
        return []
    items = [PackItem(sequence, len(sequence) - 1) for sequence in run.probe.sequences]
    plan = run.policy.plan(items, run.config.algo.max_tokens_per_micro_batch)
    trainer = run.policy.logprobs(items, plan, temperature=1.0)  # while its weights are here
    run.turns.engines()
    return run.probe.faults(trainer)
