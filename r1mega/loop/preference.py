"""Scores of reward models in reinforcement learning: in the inference phase, before advantages are worked out.

R_general = R_reward_model + R_format (DeepSeek-R1, Eq. 9): a model's score joins those of the rules. A question belongs
to one model, by its domain; the helpful one reads the final summary alone, the safety one the whole response. They
become part of the samples' scores, and so of the round's record: a replay asks no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from r1mega.config.schedule import has_preferences
from r1mega.data.summary import final_summary
from r1mega.loop import records
from r1mega.loop.wire import RlRun
from r1mega.reward.judge import with_part
from r1mega.train.batch import PackItem
from r1mega.train.reward_model import FrozenRewardModel
from r1mega.types import DOMAIN_OF, Prompt, Sample, SampleGroup, Score


def add_scores(run: RlRun, groups: Sequence[SampleGroup]) -> None:
    """Add each model's weighted score to the samples of its domain, from update `reward.preference_from` on.

    Collective; the same on every rank. A sample that a model cannot score gets `error` set, and is left out. Raises
    RuntimeError where the rewards of too many samples failed.
    """
    reward = run.config.reward
    if not run.reward_models or not has_preferences(run.config, run.state.update):
        return
    with run.timer.phase("inference"):
        run.turns.trainer()
        for name, model in run.reward_models.items():
            judged = [
                (group.prompt, sample)
                for group in groups
                for sample in group.samples
                if group.prompt.domain == DOMAIN_OF[name] and sample.score is not None
            ]
            items = [_item(run, name, prompt, sample) for prompt, sample in judged]
            found = score(model, items, run.config.algo.max_tokens_per_micro_batch)
            for (_, sample), part in zip(judged, found, strict=True):
                if name == "safety" and part.error is None:
                    part = Score(1 / (1 + math.exp(-part.value)) if part.value > -700 else 0.0)
                sample.score = with_part(sample.score, name, part, getattr(reward, name))
    records.require_rewards(groups, reward.max_failed_share)


def score(model: FrozenRewardModel, items: Sequence[PackItem], max_tokens: int) -> list[Score]:
    """The model's score of each sequence; `error` where the model has no positions for it, or gives no finite number.

    Collective; the same on every rank.
    """
    positions = model.fields["max_position_embeddings"]
    fits = [i for i, item in enumerate(items) if len(item.tokens) <= positions]
    found = [
        Score(0.0, error=f"{len(item.tokens)} tokens; the model's max_position_embeddings is {positions}")
        for item in items
    ]
    if fits:
        chosen = [items[i] for i in fits]
        # Summaries are tokenized anew, and may take more tokens than they had.
        plan = model.plan(chosen, max(max_tokens, *(len(item.tokens) for item in chosen)))
        with model.present():
            values = model.scores(chosen, plan)
        for i, value in zip(fits, values, strict=True):
            found[i] = Score(value) if math.isfinite(value) else Score(0.0, error=f"the model gives {value}")
    return found


def _item(run: RlRun, name: str, prompt: Prompt, sample: Sample) -> PackItem:
    """What the model reads, ended as in its training: the question, and the summary or the whole response."""
    tokens, end = list(sample.token_ids), run.tokenizer.eos_token_id
    if name == "helpful":
        opened = run.tokenizer.decode(prompt.token_ids[-8:]).rstrip().endswith("<think>")
        summary = final_summary(run.text_of(sample.token_ids), is_thinking=opened)
        tokens = run.tokenizer.encode(summary, add_special_tokens=False)
    if not tokens or tokens[-1] != end:
        tokens.append(end)
    return PackItem((*prompt.token_ids, *tokens), len(tokens))
