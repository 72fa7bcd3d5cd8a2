"""R1-Zero: reinforcement learning from rules alone. Read this file first.

A round is one rollout; its samples are split into the batches of several updates, each used once (DeepSeek-R1, section
2 and appendix B.1). The policy is published to the engines after the last update of a round.
"""

from __future__ import annotations

from r1mega.config.schema import Config
from r1mega.loop import phases, preference
from r1mega.loop.wire import REFERENCE, RlRun, wire_rl


def main(config: Config) -> None:
    """Run one rank of the training that `config` describes, from the first evaluation to the exported checkpoint."""
    with wire_rl(config) as run:
        train(run)


def train(run: RlRun) -> None:
    """Alternate rollout and training until `algo.updates` updates are done."""
    policy, state = run.policy, run.state
    phases.begin(run)
    while state.update < run.config.algo.updates:
        state.round += 1
        phases.rollout(run)
        groups = phases.reward(run)
        preference.add_scores(run, groups)
        batch = phases.inference(run, groups)
        for samples in phases.split_round(run, batch):
            phases.update(run, batch, samples)
            if phases.is_refresh_due(run):
                policy.keep_copy(REFERENCE)
        phases.publish(run)
        if phases.is_evaluation_due(run):
            phases.evaluate(run)
        phases.close_round(run, groups, batch)
    phases.finish(run)
