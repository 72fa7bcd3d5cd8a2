"""Programs in three languages against tests of both forms; what counts as the program, and what as equal."""

from __future__ import annotations

import shutil

import pytest

from r1mega.reward.code import CodeLimits, _same_text, _same_value, code_passes, extract_code
from r1mega.reward.languages import language_of
from r1mega.reward.sandbox import SandboxError, open_sandbox
from r1mega.types import Prompt, Score

LIMITS = CodeLimits(test_seconds=20.0, total_seconds=60.0)
IO = ({"input": "1 2\n", "output": "3\n"}, {"input": "-5 7", "output": "2"})
CALLS = (
    {"function": "add", "arguments": [1, 2], "output": 3},
    {"function": "add", "arguments": [-5, 7], "output": 2},
)
PYTHON = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.fixture(scope="module", autouse=True)
def bubblewrap() -> None:
    try:
        open_sandbox("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))


def judged(tag: str, source: str, tests: tuple = IO) -> Score:
    program = {"cpp": "g++", "js": "node", "javascript": "node"}.get(tag)
    if program and shutil.which(program) is None:
        pytest.skip(f"no {program} on this machine")
    text = f"<think> hm </think> <answer>\nHere:\n```{tag}\n{source}\n```\n</answer>"
    return code_passes(Prompt("p", "q", "", domain="code", tests=tests), text, LIMITS)


@pytest.mark.parametrize(
    ("tag", "source", "tests"),
    [
        ("python", PYTHON, IO),
        ("", PYTHON, IO),
        ("Python3", "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nexit()", IO),
        ("python", "def add(a, b):\n    print('noise')\n    return a + b", CALLS),
        ("python", "class Solution:\n    def add(self, a, b):\n        return a + b", CALLS),
        ("python", "add = lambda b, a: a + b", ({"function": "add", "arguments": {"a": 1, "b": 2}, "output": 3},)),
        ("python", "def f(x): return (x, {'k': None}, True)", (
            {"function": "f", "arguments": ["é"], "output": ["é", {"k": None}, True]},)),
        ("js", "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number)\nconsole.log(a + b)", IO),
        ("javascript", "const add = (a, b) => a + b\nconsole.log('noise')", CALLS),
        ("cpp", "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }", IO),
        ("cpp", "#include <iostream>\nint add(int a, int b) { std::cout << 9; return a + b; }", CALLS),
        ("cpp", "#include <vector>\n#include <string>\nusing namespace std;\nclass Solution { public:\n"
                "vector<string> f(vector<vector<int>>& a, const string& s, double d, bool b) {\n"
                "return {to_string(a[1][0]), s, b && d < 1 ? \"yes\" : \"no\"}; } };",
         ({"function": "f", "arguments": [[[1], [2]], "a\"\\\n", 0.5, True], "output": ["2", "a\"\\\n", "yes"]},)),
    ],
)  # fmt: skip
def test_right_programs(tag: str, source: str, tests: tuple) -> None:
    assert judged(tag, source, tests) == Score(1.0)
    wrong = tuple(test | {"output": "no" if "input" in test else ["no"]} for test in tests)
    assert judged(tag, source, (*tests, *wrong)).value == 0.0


@pytest.mark.parametrize(
    ("tag", "source", "tests", "reason"),
    [
        ("python", "print(3)", IO, "test 2 of 2: wrong output"),
        ("python", "print(3", IO, "test 1 of 2: ended with status 1 SyntaxError"),
        ("python", "def sub(a, b): return a - b", CALLS, "test 1 of 2: ended with status 1 TypeError"),
        ("python", "def add(a, b): raise SystemExit", CALLS, "test 1 of 2: no result"),
        ("python", "def add(a, b): return str(a + b)", CALLS, "test 1 of 2: wrong result"),
        ("python", "import numpy", IO, "ModuleNotFoundError"),
        ("cpp", "int main() {", IO, "does not compile"),
        ("cpp", "int sub(int a, int b) { return 0; }", CALLS, "does not compile"),
        ("rust", "fn main() {}", IO, "programs in 'rust' are not run"),
        ("python", "#" * 70_000, IO, "the program has 70001 characters"),
    ],
)  # fmt: skip
def test_wrong_programs(tag: str, source: str, tests: tuple, reason: str) -> None:
    score = judged(tag, source, tests)
    assert (score.value, score.error) == (0.0, None)
    assert reason in score.reason


def test_one_of_ten_tests_that_fails_is_enough() -> None:
    tests = tuple({"input": f"{i} 1", "output": str(i + 1 + (i == 7))} for i in range(10))
    assert judged("python", PYTHON, tests).reason == "test 8 of 10: wrong output"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", ("python", "a\n")),
        ("```\na\n```", ("", "a\n")),
        ("``` c++ x\na\n```\nand\n```js\nb\n```", ("js", "b\n")),
        ("```python\na\n```\n```python\nnever closed", ("python", "a\n")),
        ("<think>\n```python\na\n```\n</think> none", None),
        ("<think>\n```python\na\n```", None),
        ("```python\na\n```\n<answer> b </answer>", None),
        ("<answer>\n```python\na\n```\n</answer>\n```python\nb\n```", ("python", "a\n")),
        ("a = 1", None),
        ("```python a```", None),
        ("", None),
    ],
)
def test_which_text_is_the_program(text: str, program: tuple[str, str] | None) -> None:
    assert extract_code(text) == program


@pytest.mark.parametrize("unit", ["```", "```\n", "\n```x\n", "`", "```python\nx\n", "``` ", " \n"])
def test_finding_the_program_takes_linear_time(unit: str) -> None:
    import time

    began = time.process_time()
    extract_code(unit * (300_000 // len(unit)))
    assert time.process_time() - began < 3.0


def test_no_program_and_no_tests() -> None:
    prompt = Prompt("p", "q", "", domain="code", tests=IO)
    assert code_passes(prompt, "<answer> 3 </answer>", LIMITS).reason == "no code block in the answer"
    without = code_passes(Prompt("p", "q", "", domain="code"), f"```\n{PYTHON}\n```", LIMITS)
    assert without.error == "p: there are no tests; a prompt of domain code must have `tests`"


def test_a_language_without_its_compiler_is_an_error_not_a_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    language_of.cache_clear()
    try:
        score = judged("c++", "int main() {}")
    finally:
        language_of.cache_clear()
    assert score.value == 0.0
    assert "no g++ in /usr/bin" in score.error


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("12\n3", "1 2\n3", False),
        ("1.0", "1", False),
        ("", "1", False),
        ("\n1", "1", False),
    ],
)
def test_equal_output(printed: str, expected: str, same: bool) -> None:
    assert _same_text(printed, expected) is same


@pytest.mark.parametrize(
    ("expected", "result", "same"),
    [
        (1, 1, True), (1, 1.0, True), (1, True, False), (True, 1, False), (None, None, True), (None, 0, False),
        (0.1, 0.1 + 1e-13, True), (0.1, 0.1001, False), (10**30, 10**30 + 1, False), ("1", 1, False),
        ([1, [2]], [1, [2]], True), ([1, 2], [2, 1], False), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {}, False),
        (float("nan"), float("nan"), False), ([], None, False), ([], [], True), ("", [], False),
    ],
)  # fmt: skip
def test_equal_results(expected: object, result: object, same: bool) -> None:
    assert _same_value(expected, result) is same
