from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.questions import (
    Asking,
    digest,
    load_questions,
    read_examples,
    read_questions,
    row_of,
    write_questions,
)


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(
        tmp_path / "q.jsonl",
        {"question": "What is {x} if x = 2?", "answer": ["2", "two"], "language": "en"},
        {"question": "hello", "response": "Hello!", "domain": "general"},
        {"question": "One of four?", "answer": "A", "domain": "stem", "options": ["a", "b", "c", "d"]},
    )


def test_few_shot(rows: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "e.jsonl",
        {"prompt": "1+1", "response": "<think>one more</think> 2"},
        {"prompt": "what is {X}, if x=2", "response": "2"},  # the first question itself
        {"prompt": "3+3", "response": "6"},
    )
    asking = Asking(
        template="{examples}\n\nQ: {question}\nA:", examples=read_examples(path), num_examples=2,
        example="Q: {prompt}\nA: {response}",
    )  # fmt: skip
    found = read_questions(rows, asking)
    assert found[0].text == ("Q: 1+1\nA: <think>one more</think> 2\n\nQ: 3+3\nA: 6\n\nQ: What is {x} if x = 2?\nA:")
    assert "what is {X}" in found[1].text and found[0].prompt.question == "What is {x} if x = 2?"


def test_rewriting_asks_with_the_rows_own_response(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"prompt": "2+2", "answer": "4", "response": "<think>{a}</think> 4"})
    (one,) = read_questions(path, Asking(question_key="prompt", template="Rewrite {response} of {question}"))
    assert one.text == "Rewrite <think>{a}</think> 4 of 2+2" and one.prompt.answer == "4"
    with pytest.raises(ValueError, match=r"r.jsonl:1: the prompt asks for 'solution'"):
        read_questions(path, Asking(question_key="prompt", template="{solution} {question}"))


def test_what_is_left_out(rows: str) -> None:
    found = read_questions(rows, Asking(trivial_words=1), Benchmarks([("b", "if x = 2")], 3))
    assert [one.left_out for one in found] == ["contaminated", "trivial", ""]
    # Without a response of its own a short question is asked as any other.
    assert [one.left_out for one in read_questions(rows, Asking(trivial_words=9))] == ["", "trivial", ""]


def test_rows_without_a_domain(tmp_path: Path) -> None:
    path = write(tmp_path / "w.jsonl", {"prompt": "Write a poem.", "response": "Roses ..."})
    with pytest.raises(ValueError, match="key 'answer' is missing"):
        read_questions(path, Asking(question_key="prompt"))
    (one,) = read_questions(path, Asking(question_key="prompt", domain="general"))
    assert (one.prompt.domain, one.prompt.answer, one.given) == ("general", "", "Roses ...")


def test_written_and_read_again(rows: str, tmp_path: Path) -> None:
    found = read_questions(rows, Asking(trivial_words=1))
    write_questions(tmp_path / "out.jsonl", found)
    assert load_questions(tmp_path / "out.jsonl") == found
    assert digest(found) == digest(read_questions(rows, Asking()))  # what is left out may change
    assert digest(found) != digest(read_questions(rows, Asking(template="{question}!")))


def test_a_curated_row_can_be_asked_again(rows: str, tmp_path: Path) -> None:
    found = read_questions(rows, Asking())
    again = write(tmp_path / "a.jsonl", *({"prompt": one.prompt.question} | row_of(one.prompt) for one in found))
    for first, second in zip(found, read_questions(again, Asking(question_key="prompt")), strict=True):
        assert vars(first.prompt) | {"id": ""} == vars(second.prompt) | {"id": ""}
