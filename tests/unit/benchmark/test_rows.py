from __future__ import annotations

import pytest

from r1mega.benchmark.rows import Columns, digest, problems_of, read_problems, write_problems


def one(row: dict, template: str = "{question}", *, asks: str = "answer", **columns):
    return problems_of([("f:1", row)], Columns(**columns), template, asks=asks)[0]


def test_our_own_rows_and_those_of_others() -> None:
    assert one({"question": "2+2?", "answer": 4}).answer == "4"
    assert one({"problem": "2+2?", "answer": "4"}, question="problem").prompt == "2+2?"
    assert one({"question": "2+2?", "answer": "4"}, question="problem", answer="solution").answer == "4"
    assert one({"question": "?", "spans": {"spans": ["a", "b"]}}, answer="spans.spans").answer == "a|b"
    assert one({"question": "?"}, asks="").answer == ""


def test_templates_leave_latex_alone() -> None:
    template = "{passage}: {question}\n\\boxed{}. {n}"
    found = one({"question": r"\frac{1}{2}", "answer": "1", "passage": "P{question}", "n": 3}, template)
    assert found.prompt == "P{question}: \\frac{1}{2}\n\\boxed{}. 3"
    with pytest.raises(ValueError, match="f:1: the prompt asks for 'passage'"):
        one({"question": "q", "answer": "1"}, template)


@pytest.mark.parametrize("answer", [2, "C", "blue"])
def test_the_right_option_is_named_in_three_ways(answer: object) -> None:
    found = one({"question": "q", "options": ["red", "green", "blue"], "answer": answer}, asks="options")
    assert (found.answer, found.options) == ("C", ("red", "green", "blue"))


def test_options_in_columns_and_fixed_ones() -> None:
    row = {"question": "q", "A": "x", "B": "y", "answer": "B"}
    assert one(row, "{options}", asks="options", options=("A", "B")).prompt == "A) x\nB) y"
    assert one({"question": "q", "answer": 1}, asks="options", fixed_options=("yes", "no")).answer == "B"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "options": ["a", "b"], "answer": "E"}, "'E' is neither a letter A to B"),
        ({"question": "q", "options": ["a", "a"], "answer": "a"}, "exactly one option"),
        ({"question": "q", "options": ["a"], "answer": "A"}, "between 2 and 10 options"),
        ({"question": "q", "options": ["a", "b"], "answer": " "}, "'answer' must hold the answer"),
        ({"question": " ", "options": ["a", "b"], "answer": "A"}, "'question' must be text"),
    ],
)
def test_faults_name_the_row(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match="f:1: .*" + message):
        one(row, asks="options")


def test_options_are_shuffled_by_the_seed_and_the_right_one_goes_with_them() -> None:
    rows = [(f"f:{i}", {"question": f"q{i}", "options": ["w", "x", "y", "z"], "answer": "y"}) for i in range(40)]

    def shuffled(seed: int):
        return problems_of(rows, Columns(), "{question}", asks="options", shuffle_seed=seed)

    first = shuffled(1)
    assert first == shuffled(1) and first != shuffled(2)
    assert all(problem.options["ABCD".index(problem.answer)] == "y" for problem in first)
    assert {problem.answer for problem in first} == set("ABCD")
    assert all(sorted(problem.options) == ["w", "x", "y", "z"] for problem in first)
    assert {p.answer for p in problems_of(rows, Columns(), "{question}", asks="options")} == {"C"}


def test_problems_are_kept_and_their_digest_tells_them_apart(tmp_path) -> None:
    row = {"question": "ä", "tests": [{"input": "1", "output": "2"}], "contest": 7, "index": "A"}
    problems = [one(row, asks="tests")]
    write_problems(tmp_path / "p.jsonl", problems)
    assert read_problems(tmp_path / "p.jsonl") == problems
    assert (problems[0].contest, problems[0].index) == ("7", "A")
    assert digest(problems) != digest([one(row | {"question": "b"}, asks="tests")])
    with pytest.raises(ValueError, match="a list of tests"):
        one({"question": "q"}, asks="tests")


def test_a_language_is_read_where_it_is_asked_for(tmp_path) -> None:
    row = {"question": "q", "answer": "1", "language": "zh"}
    rows = [("f:1", row), ("f:2", {"question": "q", "answer": "1"})]
    plain = problems_of(rows, Columns(), "{question}", asks="answer")
    assert [problem.language for problem in plain] == [None, None]
    found = problems_of(rows, Columns(), "{question}", asks="answer", reads_language=True)
    assert [problem.language for problem in found] == ["zh", None]
    write_problems(tmp_path / "p.jsonl", found)
    assert read_problems(tmp_path / "p.jsonl") == found
    assert digest(found) != digest(plain)
    with pytest.raises(ValueError, match="f:1: 'language' must be one of en, zh, .* got 'python'"):
        problems_of([("f:1", row | {"language": "python"})], Columns(), "", asks="answer", reads_language=True)
