"""A configuration -> what a rejection sampling works with. No Megatron model is built: engines hold the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config.schema import Config
from r1mega.curation.curate import Settings
from r1mega.curation.decontaminate import Benchmarks, read_benchmarks
from r1mega.curation.filters import Limits
from r1mega.curation.questions import Asking, Question, load_questions, read_examples, read_questions
from r1mega.data.templates import prompt_ids
from r1mega.loop.sampling import SamplingRun
from r1mega.loop.wire import load_tokenizer
from r1mega.loop.wire_evaluate import chunk_size, engine_of, world_size
from r1mega.loop.wire_reward import judge_of, rule_of
from r1mega.parallel import device as devices
from r1mega.parallel import groups as process_groups
from r1mega.reward.compose import NAMES, Rule, parts_of
from r1mega.reward.pool import RewardPool
from r1mega.types import DOMAINS, Prompt, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1mega.reward.judge import Scorer

QUESTIONS_FILE, SAMPLES_FILE = "questions.jsonl", "samples.jsonl"
CURATED_FILE, REPORT_FILE = "curated.jsonl", "rejection.json"


@dataclass
class RejectionRun(SamplingRun):
    """What the loop has. `prompts` are those of `questions`; those that are left out have no tokens."""

    questions: list[Question]
    scorer: Scorer


@contextmanager
def wire_rejection(config: Config) -> Iterator[RejectionRun]:
    """The loop's objects on this rank; all of them are closed at the end, however it comes."""
    device = devices.prepare(str(config.device.type), int(os.environ.get("LOCAL_RANK", "0")), config.device.threads)
    group = process_groups.meet(timeout_minutes=config.run.timeout_minutes)
    tokenizer = load_tokenizer(config)
    questions = load_questions(Path(config.run.dir) / QUESTIONS_FILE)
    rollout, reward = config.rollout, config.reward
    stop = (*rollout.stop, *config.curate.cut_at)
    pool = RewardPool(partial(Rule, *_rule_of(config)), reward.workers, reward.timeout_seconds)
    judge, scorer = judge_of(config, pool.submit)
    params = SamplingParams(
        temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=rollout.max_tokens, stop=stop
    )
    try:
        yield RejectionRun(
            config=config,
            group=group,
            rank=group.rank(),
            num_engines=world_size(config),
            chunk_size=chunk_size(config),
            prompts=prompts_of(config, questions, tokenizer),
            tokenizer=tokenizer,
            engine=engine_of(config, tokenizer, device),
            params=params,
            questions=questions,
            scorer=scorer,
        )
    finally:
        if judge:
            judge.close()
        pool.close()
    process_groups.part()


def questions_of(config: Config) -> list[Question]:
    """The questions of data.train, as they are asked. Raises ValueError naming the row that is none."""
    data, curate = config.data, config.curate
    asking = Asking(
        question_key=data.question_key,
        answer_key=data.answer_key,
        template=curate.prompt,
        domain=curate.domain,
        examples=read_examples(curate.examples) if curate.examples is not None else (),
        num_examples=curate.num_examples,
        example=curate.example,
        trivial_words=curate.trivial_words,
    )
    return read_questions(data.train, asking, benchmarks_of(config))


def prompts_of(config: Config, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of the questions with their tokens, those that are left out without.

    Raises ValueError for a prompt over data.max_prompt_tokens.
    """
    limit, template, opening = config.data.max_prompt_tokens, str(config.data.template), config.curate.opening
    opened = tokenizer.encode(opening, add_special_tokens=False) if opening else []
    found = []
    for question in questions:
        prompt = question.prompt
        if not question.left_out:
            token_ids = (*prompt_ids(template, question.text, tokenizer), *opened)
            if len(token_ids) > limit:
                raise ValueError(
                    f"{prompt.id}: the prompt has {len(token_ids)} tokens with template {template!r} and curate.prompt,"
                    f" the limit is {limit}; raise data.max_prompt_tokens or take this row out of the file"
                )
            prompt = replace(prompt, token_ids=token_ids)
        found.append(prompt)
    return found


def benchmarks_of(config: Config) -> Benchmarks | None:
    """The n-grams of the benchmarks; None where none are named. Raises ValueError naming `path:line`."""
    curate = config.curate
    return read_benchmarks(curate.benchmarks, curate.benchmark_keys, curate.ngram) if curate.benchmarks else None


def settings_of(config: Config) -> Settings:
    """How samples are curated."""
    curate = config.curate
    limits = Limits(
        form=str(curate.form),
        min_language=curate.min_language,
        max_paragraph_words=curate.max_paragraph_words,
        code_blocks=curate.code_blocks,
        max_repetition=curate.max_repetition,
        min_thinking_words=curate.min_thinking_words,
        special_tokens=tuple(curate.special_tokens),
    )
    return Settings(limits, curate.per_prompt, str(curate.choose), config.run.seed, curate.check_responses)


def unjudged(config: Config, questions: Sequence[Question]) -> list[Question]:
    """The questions whose answers neither a rule nor the judge decides. The judge needs a known answer."""
    reward = config.reward
    ruled = {domain for domain in DOMAINS if "accuracy" in parts_of(domain, rule_of(config)[1])}
    judged = set(reward.judge_domains) if reward.judge else set()
    return [
        one
        for one in questions
        if not one.left_out
        and (not one.prompt.answer if one.prompt.domain in judged else one.prompt.domain not in ruled)
    ]


def _rule_of(config: Config) -> tuple[dict[str, float], object]:
    """All rules that see a text, those without a weight too: what they measure is what curation looks at."""
    settings = replace(rule_of(config)[1], elsewhere=frozenset(DOMAINS))
    return {name: getattr(config.reward, name) for name in NAMES}, settings
