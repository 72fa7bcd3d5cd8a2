"""What a row says of its question: domains, several answers, options, tests; every complaint names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.data.prompts import PromptSource, read_qa
from r1mega.types import Prompt

TESTS = [{"input": "1", "output": "2"}, {"function": "f", "arguments": [1], "output": [2]}]
OPTIONS = ["a", "b", "c", "d"]


def read(tmp_path: Path, **row: object) -> Prompt:
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "?", **row}), encoding="utf-8")
    return read_qa(path)[0]


def test_what_a_row_may_hold(tmp_path: Path) -> None:
    place = f"{tmp_path / 'qa.jsonl'}:1"
    assert read(tmp_path, answer=1) == Prompt(place, "?", "1")
    assert read(tmp_path, answer=["1", 2.5]) == Prompt(place, "?", "1", other_answers=("2.5",))
    assert read(tmp_path, domain="code", tests=TESTS) == Prompt(place, "?", "", domain="code", tests=tuple(TESTS))
    chosen = read(tmp_path, domain="stem", options=OPTIONS, answer="B")
    assert chosen == Prompt(place, "?", "B", domain="stem", options=tuple(OPTIONS))
    assert read(tmp_path, domain="logic", answer="12").options == ()
    assert read(tmp_path, domain="general", language="zh") == Prompt(place, "?", "", domain="general", language="zh")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1", "domain": "poetry"}, "'domain' must be one of math, code, stem, choice, logic, general"),
        ({"answer": []}, "'answer' must be text that is not blank, or a list"),
        ({"answer": ["1", " "]}, "'answer' must be text that is not blank, or a list"),
        ({"domain": "logic"}, "key 'answer' is missing"),
        ({"domain": "code"}, "'tests' must be a list that is not empty"),
        ({"domain": "code", "tests": []}, "'tests' must be a list that is not empty"),
        ({"domain": "code", "tests": [TESTS[0], {"input": "1"}]}, "test 2 must be"),
        ({"domain": "code", "tests": [{"input": 1, "output": "2"}]}, "test 1 must be"),
        ({"domain": "code", "tests": [{"function": "os.system", "arguments": [], "output": 1}]}, "test 1 must be"),
        ({"domain": "choice", "answer": "A"}, "'options' must be a list of 4 to 8 texts"),
        ({"domain": "choice", "answer": "A", "options": OPTIONS[:3]}, "'options' must be a list of 4 to 8 texts"),
        ({"answer": "A", "options": OPTIONS}, "set 'domain' to stem or choice"),
        ({"answer": "A", "language": 3}, "'language' must be text"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"qa.jsonl:1: .*{message}"):
        read(tmp_path, **row)


def test_a_run_does_not_go_on_with_other_tests() -> None:
    def source(output: str) -> PromptSource:
        return PromptSource([Prompt("p", "?", "", domain="code", tests=({"input": "", "output": output},))], seed=0)

    source("1").load_state_dict(source("1").state_dict())
    with pytest.raises(ValueError):
        source("2").load_state_dict(source("1").state_dict())
