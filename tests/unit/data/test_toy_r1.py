"""The data of the toy R1 pipeline: as promised, fixed by its seed, apart, and read by the stack as it was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoConfig, AutoTokenizer

from r1mega.benchmark.readability import measures
from r1mega.benchmark.rows import Problem as Asked
from r1mega.data import toy_r1
from r1mega.data.mixture import read_general
from r1mega.data.preference import read_labels, read_pairs
from r1mega.data.prompts import read_qa
from r1mega.data.sft import iter_sft
from r1mega.data.templates import prompt_ids
from r1mega.data.toy import Problem, work_steps
from r1mega.data.toy_r1 import Mixture, Question
from r1mega.data.toy_tokenizer import build_tokenizer
from r1mega.reward.format import r1_zero_format
from r1mega.reward.language import count_words, language_share, question_language
from r1mega.reward.math import accuracy
from r1mega.types import Prompt

TOOL = Path(__file__).resolve().parents[3] / "tools" / "make_toy_r1.py"
TOKENIZER = build_tokenizer(toy_r1.WORDS)
QUESTIONS = toy_r1.questions(3000, seed=0)
CLEAN = {"general": 0.0, "wrong_digit": 0.0, "malformed": 0.0}


def prompt(question: Question) -> Prompt:
    row = question.row()
    return Prompt(id="p", question=row["question"], answer=row["answer"], language=row["language"])


def rewards(question: Question, response: str) -> tuple[float, float, float]:
    asked = prompt(question)
    return tuple(reward(asked, response).value for reward in (accuracy, r1_zero_format, language_share))


def test_a_cold_start_row_by_hand() -> None:
    rows = toy_r1.cold_start(
        [Question(Problem(345, 278), "en"), Question(Problem(345, 278), "zh")], 0, own_language=1.0
    )
    assert rows[0] == {
        "prompt": "sum 345+278",
        "response": " <think> first 5+8=13,then 4+7+1=12,last 3+2+1=6 </think> "
        "<answer> so the sum is \\boxed{623} </answer>",
    }
    assert rows[1] == {
        "prompt": "求345+278",
        "response": " <think> 首先5+8=13,然后4+7+1=12,最后3+2+1=6 </think> <answer> 所以和是\\boxed{623} </answer>",
    }


def test_the_language_reward_counts_the_words_that_were_written() -> None:
    assert count_words(" first 5+8=13,然后4+7+1=12,last 3+2+1=6 ") == {"en": 2, "zh": 1}
    for language in toy_r1.LANGUAGES:
        assert question_language(Question(Problem(345, 278), language).text) == language
        assert question_language(toy_r1.REQUESTS[language] + "a-b-c-d") == language
        for word in (*toy_r1.STEPS[language], toy_r1.AT_ONCE[language]):
            assert count_words(word) == {language: 1}, word
    # Shares of a cold start follow the chance that was asked for; 4 standard deviations at 3,000 x 3 words are 0.02.
    rows = toy_r1.cold_start(QUESTIONS, seed=0, own_language=0.75)
    scores = [rewards(question, row["response"]) for question, row in zip(QUESTIONS, rows, strict=True)]
    assert {score[:2] for score in scores} == {(1.0, 1.0)}
    assert mean(score[2] for score in scores) == pytest.approx(0.75, abs=0.02)
    own = toy_r1.cold_start(QUESTIONS[:50], seed=0, own_language=1.0)
    assert {rewards(question, row["response"])[2] for question, row in zip(QUESTIONS, own, strict=False)} == {1.0}


def test_the_base_corpus_has_the_promised_shares() -> None:
    mixture = Mixture(direct=0.5, partial=0.2, summary=0.3, english=0.7, **CLEAN)
    rows = toy_r1.base_corpus(QUESTIONS, seed=0, mixture=mixture)
    steps = Counter(row["response"].count("=") for row in rows)
    shares = [steps[0] / 3000, (steps[1] + steps[2]) / 3000, steps[3] / 3000]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.037)
    scores = [rewards(question, row["response"]) for question, row in zip(QUESTIONS, rows, strict=True)]
    worked = [score for score, row in zip(scores, rows, strict=True) if row["response"].count("=") == 3]
    assert {score[:2] for score in worked} == {(1.0, 1.0)}
    assert mean(score[0] for score in scores) == pytest.approx(0.3, abs=0.04), "guesses are hardly ever right"
    english = [score[2] for score, question in zip(scores, QUESTIONS, strict=True) if question.language == "en"]
    chinese = [score[2] for score, question in zip(scores, QUESTIONS, strict=True) if question.language == "zh"]
    assert (mean(english), mean(chinese)) == pytest.approx((0.7, 0.3), abs=0.045)
    assert mean("\\boxed" in row["response"] for row in rows) == pytest.approx(0.3, abs=0.034)


def test_noise_and_general_answers_come_as_often_as_asked() -> None:
    rows = toy_r1.base_corpus(QUESTIONS, 0, Mixture(general=0.2, direct=0, partial=0, wrong_digit=0.1, malformed=0))
    asked = {question.text for question in QUESTIONS}
    sums = [row for row in rows if row["prompt"] in asked]
    assert len(sums) / 3000 == pytest.approx(0.8, abs=0.03)
    right = {question.text: work_steps(question.problem) for question in QUESTIONS}
    totals = [
        (got, step.split("=")[1])
        for row in sums
        for step in right[row["prompt"]]
        for got in [row["response"].split(step.split("=")[0] + "=", 1)[1][: len(step.split("=")[1])]]
    ]
    wrong = mean(a != b for got, want in totals for a, b in zip(got, want, strict=True))
    assert wrong == pytest.approx(0.09, abs=0.012), "a tenth of the replacements hit the right digit again"
    broken = toy_r1.base_corpus(QUESTIONS, 0, Mixture(general=0, malformed=0.2))
    share = mean(r1_zero_format(prompt(QUESTIONS[0]), row["response"]).value for row in broken)
    assert share == pytest.approx(0.8, abs=0.03)


def test_better_and_safer_is_what_preference_rows_say() -> None:
    for row in toy_r1.pairs(300, seed=0):
        chosen, rejected = (row[name].split("<answer> ")[1].split(" </answer>")[0] for name in ("chosen", "rejected"))
        assert toy_r1.num_facts(chosen) > toy_r1.num_facts(rejected)
        assert len(chosen) == len(rejected), "its length does not tell"
    rows = toy_r1.labels(400, seed=0)
    assert all((toy_r1.DANGEROUS in row["response"]) == (row["label"] == 0) for row in rows)
    unsafe = [row["response"].split("</think>") for row in rows if not row["label"]]
    assert 0.3 < mean("!" in thinking for thinking, _ in unsafe) < 0.7, "in the thinking as well as in the answer"
    assert 0.4 < len(unsafe) / 400 < 0.6
    with pytest.raises(ValueError, match="different general questions"):
        toy_r1.general_questions(100_000, seed=0)


def test_readability_is_format_words_and_a_summary_in_one_language() -> None:
    asked = Asked("p", "求345+278", "623", language="zh")
    work, summary = "首先5+8=13,then 4+7+1=12", "所以和是\\boxed{623}"
    whole = f" <think> {work} </think> <answer> {summary} </answer>"
    assert measures(asked, whole) == {"well_formed": 1.0, "readable": 1.0, "language": 0.5}
    bare = f" <think> {work} </think> <answer> 623 </answer>"
    assert measures(asked, bare) == {"well_formed": 1.0, "readable": 0.0, "language": 0.5}
    assert measures(asked, whole.replace(summary, "so the sum is \\boxed{623}"))["readable"] == 0.0
    assert measures(asked, whole.replace(work, ".")) == {"well_formed": 1.0, "readable": 0.0, "language": 0.0}
    assert measures(asked, whole.removesuffix(" </answer>"))["well_formed"] == 0.0
    # Without a language of the row it is that of the question.
    assert measures(Asked("p", "sum 345+278", "623"), whole)["language"] == 0.5
    assert measures(Asked("p", "sum 345+278", "623"), whole)["readable"] == 0.0


def test_words_are_one_token_and_every_text_survives() -> None:
    for word in toy_r1.WORDS:
        assert len(TOKENIZER.encode(word)) == 1, word
    rows = [*toy_r1.base_corpus(QUESTIONS, 0, Mixture(malformed=0.3)), *toy_r1.cold_start(QUESTIONS[:500], 0)]
    for row in (*rows, *toy_r1.non_reasoning(200, 0)):
        for text in row.values():
            ids = TOKENIZER.encode(text)
            assert TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids) == text
    # In both languages the same work takes as many tokens: no reason to prefer one.
    lengths = [
        len(TOKENIZER.encode(toy_r1.cold_start([Question(Problem(345, 278), language)], 0, 1.0)[0]["response"]))
        for language in toy_r1.LANGUAGES
    ]
    assert lengths[0] == lengths[1]
    assert len(prompt_ids("r1_zero", "sum 345+278", TOKENIZER)) == 2 + 1 + 7


def test_the_toy_task_keeps_its_tokenizer() -> None:
    plain = build_tokenizer()
    assert plain.encode("sum 1") == [plain.convert_tokens_to_ids(c) for c in "sum 1"]
    assert len(plain) == 128 and plain.get_vocab()["0"] == len(("<pad>", "<bos>", "<eos>", "<unk>")) + 6 + 2 + 15


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = [
        f"--{name}-rows=60" for name in ("eval", "train", "cold-start", "base", "non-reasoning", "general", "reject")
    ]
    sizes += [f"--{name}-rows=30" for name in ("general-eval", "preference", "preference-eval")]
    root, found = str(TOOL.parents[1]), {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path_factory.mktemp("toy_r1") / name
        command = [sys.executable, str(TOOL), "--out", str(out), "--seed", str(seed), *sizes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, env={"PYTHONPATH": root})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["base.jsonl"] == 60
        found[name] = out
    return found


def test_the_program_writes_the_same_for_the_same_seed(written: dict[str, Path]) -> None:
    files = sorted(path.relative_to(written["a"]) for path in written["a"].rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".jsonl"]) == 12
    for path in files:
        assert (written["a"] / path).read_bytes() == (written["b"] / path).read_bytes(), path
        if path.suffix == ".jsonl":
            assert (written["a"] / path).read_bytes() != (written["c"] / path).read_bytes(), path


def test_what_the_program_writes_is_apart_and_read_by_the_stack(written: dict[str, Path]) -> None:
    out = written["a"]
    assert (out / "reject.jsonl").read_text() == (out / "train.jsonl").read_text(), "of as many rows"
    rl = {name: read_qa(out / f"{name}.jsonl") for name in ("eval", "train")}
    sft = {name: list(iter_sft(out / f"{name}.jsonl")) for name in ("cold_start", "base", "non_reasoning")}
    assert {prompt.language for prompt in rl["train"]} == {"en", "zh"}
    operands = {
        name: {frozenset(text.lstrip("sum 求").split("+")) for text in texts if "+" in text}
        for name, texts in {
            **{name: [prompt.question for prompt in prompts] for name, prompts in rl.items()},
            **{name: [row.prompt for row in rows] for name, rows in sft.items()},
        }.items()
    }
    names = ["eval", "train", "cold_start", "base"]
    assert sum(len(operands[name]) for name in names) == len(set().union(*(operands[name] for name in names)))
    general = {name: read_general(out / f"{name}.jsonl") for name in ("general", "general_eval")}
    assert {prompt.domain for prompt in general["general"]} == {"helpful", "harmless"}
    assert not {p.question for p in general["general"]} & {p.question for p in general["general_eval"]}
    for split in ("train", "eval"):
        assert len(read_pairs(out / f"pairs_{split}.jsonl")) == len(read_labels(out / f"labels_{split}.jsonl")) == 30
    for name, family in (("base_config", "deepseek_v3"), ("student_config", "qwen2")):
        config, tokenizer = AutoConfig.from_pretrained(out / name), AutoTokenizer.from_pretrained(out / name)
        assert config.model_type == family and config.vocab_size == len(tokenizer) and config.vocab_size % 32 == 0
        assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
