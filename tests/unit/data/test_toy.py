"""The toy task: right work, the promised mixture, a tokenizer that loses nothing, the program that writes it all."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from r1mega.data.prompts import read_qa
from r1mega.data.sft import iter_sft
from r1mega.data.templates import prompt_ids
from r1mega.data.toy import NO_WORK, Mixture, Problem, corpus, problems, work_steps, write_response
from r1mega.data.toy_tokenizer import build_tokenizer
from r1mega.reward.format import r1_zero_format
from r1mega.types import Prompt

TOOL = Path(__file__).resolve().parents[3] / "tools" / "make_toy.py"
TOKENIZER = build_tokenizer()
CLEAN = {"wrong_digit": 0.0, "malformed": 0.0}


def well_formed(response: str) -> bool:
    return r1_zero_format(Prompt(id="p", question="", answer=""), response).value == 1.0


def test_work_goes_from_the_last_digit_up_and_carries() -> None:
    assert work_steps(Problem(345, 278)) == ["5+8=13", "4+7+1=12", "3+2+1=6"]
    assert work_steps(Problem(999, 101)) == ["9+1=10", "9+0+1=10", "9+1+1=11"]
    assert Problem(345, 278).answer == "623"


def test_no_two_problems_share_their_operands() -> None:
    drawn = problems(5000, seed=0)
    assert len({frozenset((problem.left, problem.right)) for problem in drawn}) == 5000
    assert all(100 <= value <= 999 for problem in drawn for value in (problem.left, problem.right))
    assert drawn == problems(5000, seed=0)
    assert drawn != problems(5000, seed=1)
    with pytest.raises(ValueError, match="at most"):
        problems(10**6, seed=0)


def test_the_corpus_has_the_promised_shares() -> None:
    mixture = Mixture(direct=0.5, partial=0.25, full=0.15, twice=0.1, **CLEAN)
    rows = corpus(problems(8000, seed=0), seed=0, mixture=mixture)
    num_steps = Counter(row["response"].count("=") for row in rows)
    shares = [num_steps[0], num_steps[1] + num_steps[2], num_steps[3], num_steps[6]]
    assert sum(shares) == 8000
    # Four standard deviations of a share of one half at this size are 0.022.
    assert [count / 8000 for count in shares] == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.022)


def test_a_clean_corpus_is_right_where_it_is_worked_out_and_well_formed() -> None:
    drawn = problems(2000, seed=0)
    guesses, hits = 0, 0
    for problem, row in zip(drawn, corpus(drawn, seed=0, mixture=Mixture(**CLEAN)), strict=True):
        assert row["prompt"] == problem.question
        assert well_formed(row["response"])
        work = row["response"].split(" <think> ")[1].split(" </think> ")[0]
        answer = row["response"].split("<answer> ")[1].split(" </answer>")[0]
        assert row["response"] == write_response(work, answer)
        steps = [] if work == NO_WORK else work.split(",")
        assert steps == (work_steps(problem) * 2)[: len(steps)]
        if len(steps) >= 3:
            assert answer == problem.answer
        else:
            assert int(answer) % 10 ** len(steps) == int(problem.answer) % 10 ** len(steps)
            assert 200 <= int(answer) <= 1998
            guesses, hits = guesses + 1, hits + (answer == problem.answer)
    # Guesses of one digit are right one time in about ten; of three, hardly ever.
    assert guesses > 1000
    assert hits / guesses < 0.05


def test_wrong_digits_and_malformed_responses_come_as_often_as_asked() -> None:
    drawn = problems(4000, seed=0)
    worked = Mixture(direct=0.0, partial=0.0, full=1.0, twice=0.0, wrong_digit=0.1, malformed=0.0)
    noisy = corpus(drawn, seed=0, mixture=worked)
    answers = [row["response"].split("<answer> ")[1].split(" </answer>")[0] for row in noisy]
    pairs = [
        pair
        for answer, problem in zip(answers, drawn, strict=True)
        for pair in zip(answer, problem.answer, strict=True)
    ]
    # A tenth of the replacements hit the right digit again.
    assert sum(got != right for got, right in pairs) / len(pairs) == pytest.approx(0.09, abs=0.012)
    broken = corpus(drawn, seed=0, mixture=Mixture(wrong_digit=0.0, malformed=0.2))
    assert sum(not well_formed(row["response"]) for row in broken) / 4000 == pytest.approx(0.2, abs=0.026)


def test_the_corpus_is_fixed_by_its_seed() -> None:
    drawn = problems(300, seed=0)
    assert corpus(drawn, seed=1) == corpus(drawn, seed=1)
    assert corpus(drawn, seed=1) != corpus(drawn, seed=2)


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="must add up to 1, got 1.2"):
        Mixture(direct=0.6, partial=0.2, full=0.2, twice=0.2)


def test_the_published_prompt_costs_two_tokens_and_a_tag_one() -> None:
    assert len(prompt_ids("r1_zero", "345+278", TOKENIZER)) == 2 + 7
    pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(write_response("1+1=2", "2")))
    assert pieces == [" <think> ", *"1+1=2", " </think> ", "<answer> ", "2", " </answer>"]


def test_every_text_of_the_corpus_survives_the_tokenizer() -> None:
    for row in corpus(problems(2000, seed=0), seed=0, mixture=Mixture(malformed=0.5)):
        assert TOKENIZER.decode(TOKENIZER.encode(row["response"])) == row["response"]


@given(st.text(alphabet=string.ascii_letters + string.digits + string.punctuation + " \n"))
def test_every_printable_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_other_characters_become_the_unknown_token() -> None:
    assert TOKENIZER.encode("é") == [TOKENIZER.unk_token_id]


def test_special_tokens_vanish_and_tags_stay_when_special_tokens_are_skipped() -> None:
    ids = [*TOKENIZER.encode(write_response(".", "2")), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == write_response(".", "2")


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen2", "llama"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("toy") / request.param
    sizes = ["--sft-rows", "200", "--train-rows", "60", "--eval-rows", "40"]
    command = [sys.executable, str(TOOL), "--out", str(out), "--seed", "3", "--family", request.param, *sizes]
    root = str(TOOL.parents[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, env={"PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sft.jsonl"] == 200
    return out, request.param


def test_the_program_writes_what_the_stack_reads(written: tuple[Path, str]) -> None:
    out, family = written
    config = AutoConfig.from_pretrained(out / "base_config")
    tokenizer = AutoTokenizer.from_pretrained(out / "base_config")
    assert config.model_type == family
    assert config.vocab_size == len(tokenizer) == len(TOKENIZER)
    assert config.vocab_size % 32 == 0
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.pad_token_id,
        config.bos_token_id,
        config.eos_token_id,
    )
    text = write_response("1+1=2", "2")
    assert tokenizer.encode(text) == TOKENIZER.encode(text)


def test_no_problem_stands_in_two_files(written: tuple[Path, str]) -> None:
    out, _ = written
    train, held_out = read_qa(out / "train.jsonl"), read_qa(out / "eval.jsonl")
    questions = [prompt.question for prompt in (*train, *held_out)]
    questions += [row.prompt for row in iter_sft(out / "sft.jsonl")]
    assert len({frozenset(question.split("+")) for question in questions}) == len(questions) == 300
    assert all(int(prompt.answer) == sum(map(int, prompt.question.split("+"))) for prompt in (*train, *held_out))


def test_help_answers_without_loading_the_stack() -> None:
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--family" in done.stdout
    assert "transformers" not in done.stderr


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), "--eval-rows", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--eval-rows must be at least 1, got 0" in done.stderr
