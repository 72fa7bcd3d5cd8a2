"""The loop of rejection sampling with an engine that says what it is told to, and a judge that may fail."""

from __future__ import annotations

import json
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from r1mega.benchmark.samples import SampleFile, Scored
from r1mega.config import choices
from r1mega.config.schema import Config
from r1mega.curation.questions import Question
from r1mega.loop import reject, sampling
from r1mega.loop.wire_reject import RejectionRun, _rule_of, unjudged
from r1mega.parallel.seed import derive
from r1mega.reward.compose import Rule
from r1mega.reward.judge import with_judge
from r1mega.reward.pool import RewardPool
from r1mega.types import Completion, FinishReason, Prompt, Request, SamplingParams, Score

MATHS = Question(Prompt("f:1", "2+2?", "4", token_ids=(1,)), "2+2?")
LOGIC = Question(Prompt("f:2", "Who lies?", "Ada", token_ids=(2,), domain="logic"), "Who lies?")
HELLO = Question(Prompt("f:3", "hello", "", domain="general"), "hello", given="Hello!", left_out="trivial")
SAID = {
    (1, 0): "a sum</think> \\boxed{4} stop and more",
    (1, 1): "a sum</think> \\boxed{5} stop",
    (2, 0): "he says so</think> It is Ada. stop",
    (2, 1): "he says so</think> It is Bob.",
}


class Engine:
    """Says SAID by prompt and sample; counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def generate(self, requests, params, on_finished) -> None:
        for request in requests:
            self.asked += 1
            (text,) = (SAID[request.token_ids[0], j] for j in range(2) if request.seed == seed_of(request, j))
            why = FinishReason.stop if "stop" in text else FinishReason.length
            on_finished(Completion(request.key, 0, list(map(ord, text)), [0.0] * len(text), why, 0))


def seed_of(request: Request, sample: int) -> int:
    """By which a sample is known, whatever else is asked with it."""
    return derive(0, "sample", request.token_ids[0] - 1, sample)


class Tokenizer:
    eos_token_id = 0

    def decode(self, tokens, skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


class Judge:
    """Right where the answer names the truth; down where it is told to be."""

    def __init__(self) -> None:
        self.is_down, self.asked = False, []

    def verdict(self, prompt: Prompt, text: str) -> Future[Score]:
        self.asked.append(prompt.id)
        found: Future[Score] = Future()
        score = Score(float(prompt.answer in text))
        found.set_result(Score(0.0, error="no reply") if self.is_down else score)
        return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RejectionRun:
    monkeypatch.setattr(sampling, "share", lambda value, group: value)
    monkeypatch.setattr(sampling, "gather", lambda value, group: [value])
    monkeypatch.setattr(reject, "fingerprint", lambda path: "digest")
    config = Config()
    config.run.dir, config.model.hf = str(tmp_path), "policy"
    config.rollout.engine, config.logger.console = choices.EngineKind.sglang, False
    config.stage.loop = choices.Loop.reject
    config.reward.judge = 1.0
    config.curate.samples, config.curate.opening, config.curate.cut_at = 2, "<think>", [" stop"]
    pool, judge = RewardPool(partial(Rule, *_rule_of(config)), 0, 5.0), Judge()
    run = RejectionRun(
        config=config, group=None, rank=0, num_engines=1, chunk_size=8,
        prompts=[question.prompt for question in (MATHS, LOGIC, HELLO)],
        tokenizer=Tokenizer(), engine=Engine(), params=SamplingParams(), questions=[MATHS, LOGIC, HELLO],
        scorer=with_judge(pool.submit, judge, 1.0, frozenset({"logic"})),
    )  # fmt: skip
    run.judge = judge
    return run


def go(run: RejectionRun) -> tuple[list[dict], dict]:
    path = Path(run.config.run.dir)
    with SampleFile(path / "samples.jsonl", Scored) as file:
        reject.generate(run, file)
        reject.finish(run, file)
    rows = [json.loads(line) for line in (path / "curated.jsonl").read_text().splitlines()]
    return rows, json.loads((path / "rejection.json").read_text())


def test_rules_and_the_judge_decide_each_in_their_domains(run: RejectionRun) -> None:
    rows, report = go(run)
    assert [row["response"] for row in rows] == [
        "<think>a sum</think> \\boxed{4}", "<think>he says so</think> It is Ada.", "Hello!",
    ]  # fmt: skip
    assert run.judge.asked == ["f:2", "f:2"]
    assert rows[1]["provenance"]["reward"]["judge"] == 1.0 and "judge" not in rows[0]["provenance"]["reward"]
    assert rows[0]["provenance"]["sampler"] == {"model": "policy", "weights": "digest"}
    assert report["dropped"] == {"cut_off": 1, "wrong": 1} and report["acceptance_rate"] == 0.5
    assert report["domains"]["logic"] == {
        "questions": 1, "questions_kept": 1, "samples": 2, "right": 1, "kept": 1, "dropped": {"cut_off": 1},
    }  # fmt: skip
    assert (report["given"], report["kept"], report["samples"]) == (1, 3, 4)


def test_a_judge_that_is_down_ends_the_run_and_is_asked_again(run: RejectionRun) -> None:
    run.judge.is_down = True
    with pytest.raises(ValueError, match="the rewards of 2 of 4 samples failed.*f:2: judge: no reply"):
        go(run)
    assert not (Path(run.config.run.dir) / "curated.jsonl").exists() and run.engine.asked == 4
    run.judge.is_down = False
    rows, report = go(run)
    assert run.engine.asked == 4, "no sample is drawn again"
    assert len(rows) == 3 and report["dropped"] == {"cut_off": 1, "wrong": 1}
    go(run)
    assert len(run.judge.asked) == 4, "and what is scored is not scored again"


def test_what_is_there_is_not_drawn_again_and_the_rows_are_the_same(run: RejectionRun) -> None:
    directory = Path(run.config.run.dir)
    go(run)
    lines = (directory / "samples.jsonl").read_bytes().splitlines(keepends=True)
    wanted = [(directory / name).read_bytes() for name in ("curated.jsonl", "rejection.json")]
    for left in range(4):
        asked = run.engine.asked
        # In another order, and the last one broken off, as a kill leaves them.
        (directory / "samples.jsonl").write_bytes(b"".join(lines[:left][::-1]) + lines[left][:30])
        go(run)
        assert run.engine.asked == asked + 4 - left
        assert [(directory / name).read_bytes() for name in ("curated.jsonl", "rejection.json")] == wanted


def test_failures_within_the_share_are_counted(run: RejectionRun) -> None:
    run.judge.is_down, run.config.reward.max_failed_share = True, 0.5
    rows, report = go(run)
    assert report["dropped"] == {"failed": 2, "wrong": 1} and len(rows) == 2


def test_the_pattern_of_the_cold_start(run: RejectionRun) -> None:
    run.config.curate.special_tokens = ["|special_token|", "|special_token|"]
    rows, _ = go(run)
    assert rows[0]["response"] == "|special_token|a sum|special_token|\\boxed{4}"
    assert rows[2]["response"] == "Hello!"  # nothing to think about


def test_nothing_kept_is_no_success(run: RejectionRun) -> None:
    run.config.curate.min_thinking_words = 99
    run.questions, run.prompts = run.questions[:1], run.prompts[:1]
    with pytest.raises(ValueError, match=r"no sample of 2 is kept \(short_thinking 1, wrong 1\)"):
        go(run)
    assert (Path(run.config.run.dir) / "rejection.json").exists()


def test_what_nobody_decides() -> None:
    config, general = Config(), Question(Prompt("f:4", "Write.", "", domain="general"), "Write.")
    assert unjudged(config, [MATHS, LOGIC, HELLO, general]) == [general]  # logic has rules too
    config.reward.judge, config.reward.judge_domains = 1.0, ["general"]
    assert unjudged(config, [general]) == [general], "a judge compares with a known answer"
    assert unjudged(config, [Question(Prompt("f:5", "Who?", "Ada", domain="general"), "Who?")]) == []


def test_cutting() -> None:
    assert reject.cut("a\nQ: b", ["\nQ:", "b"]) == ("a", True)
    assert reject.cut("a", ["\nQ:"]) == ("a", False) and reject.cut("a", []) == ("a", False)


def test_a_sample_whose_score_fails_fails_too_and_is_waited_for_by_nobody() -> None:
    score: Future[Score] = Future()
    sample = sampling.graded(score, lambda found: found)
    score.set_exception(RuntimeError("whoever scores is gone"))
    with pytest.raises(RuntimeError, match="whoever scores is gone"):
        sample.result(timeout=1)
