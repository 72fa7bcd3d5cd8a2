"""Which samples a reward model scores in RL, what it reads, and what becomes of one it cannot score."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from r1mega.config.schema_reward import RewardConfig
from r1mega.data.toy_tokenizer import build_tokenizer
from r1mega.loop import preference, records
from r1mega.loop.wire_reward import judge_of
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


class Model:
    """Scores a sequence by its length, and nothing outside `present`."""

    fields = {"max_position_embeddings": 30}

    def __init__(self, special: dict[int, float] | None = None) -> None:
        self.seen, self.special, self.is_present, self.max_tokens = [], special or {}, False, 0

    def plan(self, items, max_tokens):
        self.max_tokens = max_tokens
        return "plan"

    @contextmanager
    def present(self):
        self.is_present = True
        yield
        self.is_present = False

    def scores(self, items, plan):
        assert self.is_present and plan == "plan"
        self.seen += [item.tokens for item in items]
        return [self.special.get(len(item.tokens), float(len(item.tokens))) for item in items]


def sample(text: str, score: Score | None = None) -> Sample:
    ids = TOKENIZER.encode(text)
    return Sample("p", 0, ids, [1] * len(ids), [0.0] * len(ids), FinishReason.length, 0, text, score or Score(0.5))


def run_of(models: dict, *, update: int = 5, **weights) -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(
            reward=RewardConfig(**{"max_failed_share": 1.0} | weights),
            algo=SimpleNamespace(max_tokens_per_micro_batch=16),
        ),
        state=SimpleNamespace(update=update),
        reward_models=models,
        timer=SimpleNamespace(phase=lambda name: nullcontext()),
        turns=SimpleNamespace(trainer=lambda: None),
        tokenizer=TOKENIZER,
        text_of=lambda ids: TOKENIZER.decode(ids),
    )  # fmt: skip


def group(domain: str, *texts: str) -> SampleGroup:
    return SampleGroup(Prompt("p", "q", "a", tuple(TOKENIZER.encode("q?")), domain), [sample(text) for text in texts])


def test_each_model_reads_its_own_questions():
    helpful, safety = Model(), Model()
    groups = [group("math", "x"), group("helpful", " <think> ab </think> cd"), group("harmless", "ab")]
    preference.add_scores(run_of({"helpful": helpful, "safety": safety}, helpful=2, safety=1), groups)
    prompt = groups[0].prompt.token_ids
    assert helpful.seen == [(*prompt, *TOKENIZER.encode("cd"), END)]
    assert safety.seen == [(*prompt, *TOKENIZER.encode("ab"), END)]
    scores = [one.samples[0].score for one in groups]
    assert scores[0] == Score(0.5)
    assert scores[1] == Score(0.5 + 2 * 5, {"helpful": 5.0})
    assert scores[2].parts["safety"] == pytest.approx(1 / (1 + math.exp(-5)))
    assert scores[2].value == pytest.approx(0.5 + 1 / (1 + math.exp(-5)))
    values = records.round_metrics(groups)
    assert (values["reward/helpful"], values["reward/safety"]) == (5.0, scores[2].parts["safety"])


def test_nothing_before_the_window():
    groups, model = [group("helpful", "ab")], Model()
    run = run_of({"helpful": model}, update=5, helpful=1, preference_from=6)
    preference.add_scores(run, groups)
    assert groups[0].samples[0].score == Score(0.5) and not model.seen
    run.state.update = 6
    preference.add_scores(run, groups)
    assert groups[0].samples[0].score == Score(5.5, {"helpful": 5.0})


def test_a_response_without_a_summary_is_scored_as_an_empty_one():
    model, groups = Model(), [group("helpful", " <think> ab")]
    preference.add_scores(run_of({"helpful": model}, helpful=1), groups)
    assert model.seen == [(*groups[0].prompt.token_ids, END)]


def test_what_cannot_be_scored_is_marked_and_left_out():
    model = Model({7: float("nan"), 8: float("inf")})
    groups = [group("helpful", "a" * 40, "abcd", "abcde", "a" * 20)]
    preference.add_scores(run_of({"helpful": model}, helpful=1), groups)
    errors = [one.score.error for one in groups[0].samples]
    assert errors[0].startswith("helpful: 43 tokens; the model's max_position_embeddings is 30")
    assert errors[1:3] == ["helpful: the model gives nan", "helpful: the model gives inf"] and errors[3] is None
    assert all("helpful" not in one.score.parts for one in groups[0].samples[:3])
    assert model.max_tokens == 23, "a summary longer than the micro-batch's limit still has its place"
    assert records.round_metrics(groups)["reward/failed"] == 0.75


def test_an_error_before_stays():
    groups = [group("helpful", "ab")]
    groups[0].samples[0].score = Score(0.0, error="killed")
    preference.add_scores(run_of({"helpful": Model()}, helpful=1), groups)
    assert groups[0].samples[0].score.error == "killed"


def test_safety_far_from_zero():
    groups = [group("harmless", "ab", "abc")]
    preference.add_scores(run_of({"safety": Model({5: -1e4, 6: 1e4})}, safety=1), groups)
    assert [one.score.parts["safety"] for one in groups[0].samples] == [0.0, 1.0]


def test_a_judge_only_where_it_weighs():
    scorer = object()
    config = SimpleNamespace(reward=RewardConfig())
    assert judge_of(config, scorer) == (None, scorer)
    config.reward = RewardConfig(judge=1.0, judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_seconds=0.2)
    judge, joined = judge_of(config, scorer)
    try:
        assert callable(joined) and judge._url == "http://127.0.0.1:9/v1/chat/completions"
    finally:
        judge.close()
