"""Questions: what is read, what is refused, and the order in which they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.data.prompts import PromptSource, read_qa, tokenize_prompts
from r1mega.data.toy_tokenizer import build_tokenizer
from r1mega.types import Prompt

PROMPTS = [Prompt(id=f"f:{number}", question=f"{number}+1", answer=str(number + 1)) for number in range(10)]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_become_prompts_with_file_and_line_as_id(tmp_path: Path) -> None:
    path = write(tmp_path, '{"problem": "1+1", "answer": 2, "level": 1}\n\n{"problem": "2+2", "answer": "4"}\n')
    assert read_qa(path, "problem", "answer") == [
        Prompt(id=f"{path}:1", question="1+1", answer="2"),
        Prompt(id=f"{path}:3", question="2+2", answer="4"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "qa.jsonl: the file is empty"),
        ("\n \n", "qa.jsonl: the file is empty"),
        ('{"question": "1", "answer": "1"}\n{"question": "2", "ans', r"qa.jsonl:2: not valid JSON .*column"),
        ("[1, 2]\n", "qa.jsonl:1: a JSON object is expected, got list"),
        ('{"question": "1"}\n', "qa.jsonl:1: key 'answer' is missing; the keys there are 'question'"),
        ('{"question": " ", "answer": "1"}\n', "qa.jsonl:1: 'question' must be text"),
        ('{"question": "1", "answer": null}\n', "qa.jsonl:1: 'answer' must be text"),
        ('{"question": "1", "answer": true}\n', "qa.jsonl:1: 'answer' must be text"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_qa(write(tmp_path, text))


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        read_qa(tmp_path / "none.jsonl")
    path = tmp_path / "binary.jsonl"
    path.write_bytes(b'{"question": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"binary.jsonl:1: not UTF-8"):
        read_qa(path)


def test_prompts_are_tokenized_with_the_template() -> None:
    tokenizer = build_tokenizer()
    tokenized = tokenize_prompts(PROMPTS, tokenizer, "plain", max_prompt_tokens=3)
    assert [tokenizer.decode(prompt.token_ids) for prompt in tokenized] == [prompt.question for prompt in PROMPTS]
    assert tokenized[0].id == "f:0"


def test_a_prompt_over_the_limit_is_refused_not_cut() -> None:
    prompts = [*PROMPTS, Prompt(id="f:77", question="1234+5678", answer="6912")]
    with pytest.raises(ValueError, match=r"f:77: .* 9 tokens .* the limit is 3; raise data.max_prompt_tokens"):
        tokenize_prompts(prompts, build_tokenizer(), "plain", max_prompt_tokens=3)


def test_each_epoch_gives_every_prompt_once_in_an_order_of_its_own() -> None:
    source = PromptSource(PROMPTS, seed=1)
    epochs = [[prompt.id for prompt in source.next(10)] for _ in range(3)]
    assert all(sorted(ids) == sorted(prompt.id for prompt in PROMPTS) for ids in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_fixed_by_the_seed_alone() -> None:
    whole = PromptSource(PROMPTS, seed=1).next(25)
    pieces = PromptSource(PROMPTS, seed=1)
    assert [*pieces.next(7), *pieces.next(0), *pieces.next(18)] == whole
    assert PromptSource(PROMPTS, seed=2).next(25) != whole


def test_without_shuffling_the_order_is_the_file() -> None:
    assert PromptSource(PROMPTS, seed=1, shuffle=False).next(12) == [*PROMPTS, *PROMPTS[:2]]


@pytest.mark.parametrize("taken", [0, 4, 10, 17])
def test_a_saved_source_resumes_at_the_very_prompt(taken: int) -> None:
    source = PromptSource(PROMPTS, seed=3)
    source.next(taken)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = PromptSource(PROMPTS, seed=3)
    resumed.next(2)
    resumed.load_state_dict(state)
    assert resumed.next(23) == source.next(23)
    assert resumed.epoch == source.epoch


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptSource(PROMPTS, seed=4), "seed=3, this run has 4"),
        (PromptSource(PROMPTS, seed=3, shuffle=False), "shuffle=True, this run has False"),
        (PromptSource(PROMPTS[:9], seed=3), "num_items=10, this run has 9"),
        (PromptSource([*PROMPTS[1:], PROMPTS[0]], seed=3), "content="),
    ],
)
def test_a_state_of_other_data_is_refused(other: PromptSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(PromptSource(PROMPTS, seed=3).state_dict())


def test_no_prompts_and_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        PromptSource([], seed=0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        PromptSource(PROMPTS, seed=0).next(-1)
