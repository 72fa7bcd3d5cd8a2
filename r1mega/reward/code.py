"""The code reward: 1 when the response's program passes every test, else 0 (DeepSeek-R1, section 2.2).

A test is `{"input": text, "output": text}`, what the program reads and must print, or `{"function": name, "arguments":
[...], "output": value}`, a call and its result. The program is the last complete code block of the answer; its tag
says the language, python where it has none. It runs in a sandbox; what a test expects is compared outside of it.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1mega.reward.answer import final_part
from r1mega.reward.languages import IDENTIFIER, Language, cpp_call, language_of
from r1mega.reward.sandbox import BUBBLEWRAP, File, Limits, Sandbox, SandboxError, open_sandbox
from r1mega.types import Prompt, Score

MAX_CODE_CHARS = 1 << 16
NO_CODE = "no code block in the answer"
COMPILE_SECONDS = 30.0
# A compiler takes more than the program it makes.
_COMPILER = Limits(seconds=COMPILE_SECONDS, memory=2 << 30)
_BINARY_BYTES = 32 << 20
_FENCE = re.compile(r"[ \t]*```[ \t]*([^\s`]*)[^`]*")


@dataclass(frozen=True)
class CodeLimits:
    """What the tests of one program may take: each in seconds and MiB, all of them together in seconds."""

    test_seconds: float = 6.0
    total_seconds: float = 60.0
    memory_mib: int = 1024
    sandbox: str = BUBBLEWRAP

    @property
    def hard_seconds(self) -> float:
        """Within this the verdict is there; the compiler counts on top."""
        return self.total_seconds + COMPILE_SECONDS + 10.0


@dataclass(frozen=True)
class _Program:
    """A program that is ready to run, and the sandbox it runs in."""

    language: Language
    files: Mapping[str, File]
    sandbox: Sandbox


class _Wrong(Exception):
    """The program has failed; the text says how."""


def code_passes(prompt: Prompt, text: str, limits: CodeLimits) -> Score:
    """1 when the program in `text` passes all of `prompt.tests`, else 0 with the reason.

    A sandbox that does not work, a language without its compiler and malformed tests give a Score with `error` set.
    """
    if not prompt.tests:
        return Score(0.0, error=f"{prompt.id}: there are no tests; a prompt of domain code must have `tests`")
    found = extract_code(text)
    if found is None:
        return Score(0.0, reason=NO_CODE)
    tag, source = found
    if len(source) > MAX_CODE_CHARS:
        return Score(0.0, reason=f"the program has {len(source)} characters, at most {MAX_CODE_CHARS} are read")
    try:
        language = language_of(tag)
        if language is None:
            return Score(0.0, reason=f"programs in {tag[:20]!r} are not run; use python, cpp or javascript")
        _run_all(language, source, prompt.tests, limits)
    except _Wrong as wrong:
        return Score(0.0, reason=str(wrong))
    except SandboxError as error:
        return Score(0.0, error=str(error))
    return Score(1.0)


def extract_code(text: str) -> tuple[str, str] | None:
    """The tag and the content of the answer's last complete code block, None without one. What stands in the thinking
    is no answer. Linear in the length of the text."""
    found, tag, content = None, None, []
    for line in final_part(text).splitlines(keepends=True):
        fence = _FENCE.fullmatch(line.rstrip())
        if tag is None and fence:
            tag, content = fence[1], []
        elif tag is not None and fence and line.strip() == "```":
            found, tag = (tag, "".join(content)), None
        elif tag is not None:
            content.append(line)
    return found


def _run_all(language: Language, source: str, tests: Sequence[Mapping[str, Any]], limits: CodeLimits) -> None:
    """Raises _Wrong at the first test that fails."""
    sandbox = open_sandbox(limits.sandbox)
    program = _prepared(language, source, tests, sandbox)
    began = time.monotonic()
    for number, test in enumerate(tests, start=1):
        left = began + limits.total_seconds - time.monotonic()
        if left <= 0:
            raise _Wrong(f"test {number} of {len(tests)}: no time left of {limits.total_seconds:g} s for all tests")
        allowed = Limits(seconds=min(limits.test_seconds, left), memory=limits.memory_mib << 20)
        complaint = _fault(program, number - 1, test, allowed)
        if complaint:
            raise _Wrong(f"test {number} of {len(tests)}: {complaint}")


def _prepared(language: Language, source: str, tests: Sequence[Mapping[str, Any]], sandbox: Sandbox) -> _Program:
    """Compile where the language is compiled. Raises _Wrong where that fails."""
    calls = [test for test in tests if "function" in test]
    for test in calls:
        if not IDENTIFIER.fullmatch(str(test["function"])):
            raise SandboxError(f"a test calls {test['function']!r}, which is no name of a function")
    if language.compile is None:
        files = {language.file: File(source.encode(errors="replace"))}
        if calls and language.harness is not None:
            name, harness = language.harness
            files[name] = File(harness.encode())
        return _Program(language, files, sandbox)
    if calls:
        source = cpp_call(source, [test if "function" in test else None for test in tests])
    binary = sandbox.run(
        ["/bin/sh", "-c", '"$@" >&2 && cat main', "compile", *language.compile],
        b"",
        {language.file: File(source.encode(errors="replace"))},
        replace(_COMPILER, output=_BINARY_BYTES),
    )
    if binary.stopped or binary.returncode != 0 or not binary.stdout:
        lines = binary.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line] or lines or [f"status {binary.returncode}"]
        raise _Wrong(f"does not compile: {binary.stopped or errors[0][:200]}")
    return _Program(language, {"main": File(binary.stdout, executable=True)}, sandbox)


def _fault(program: _Program, index: int, test: Mapping[str, Any], limits: Limits) -> str:
    """What is wrong with the program's answer to one test, "" where it is right; never says what is expected."""
    language = program.language
    is_call = "function" in test
    if not is_call:
        command, stdin = language.run, str(test["input"])
    elif language.compile is not None:
        command, stdin = (*language.run, str(index)), ""
    else:
        command = language.call
        stdin = json.dumps({"function": test["function"], "arguments": test["arguments"]})
    allowed = replace(limits, memory=limits.memory + language.reserved)
    outcome = program.sandbox.run(command, stdin.encode(errors="replace"), program.files, allowed)
    if outcome.stopped:
        return outcome.stopped
    if outcome.returncode != 0:
        last = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        return f"ended with status {outcome.returncode} {last[0][:200]}".strip()
    printed = outcome.stdout.decode(errors="replace")
    if not is_call:
        return "" if _same_text(printed, str(test["output"])) else "wrong output"
    try:
        result = json.loads(printed)
    except (ValueError, RecursionError):
        return "no result"
    return "" if _same_value(test["output"], result) else "wrong result"


def _same_text(printed: str, expected: str) -> bool:
    """Equal line by line and word by word: what surrounds words, and lines left empty at the end, do not count."""

    def words(text: str) -> list[list[str]]:
        return [line.split() for line in text.rstrip().splitlines()]

    return words(printed) == words(expected)


def _same_value(expected: Any, result: Any) -> bool:
    """Equal as JSON. Fractions within 1e-9 of the larger; a bool is no number; lists in order."""
    if isinstance(expected, bool) or isinstance(result, bool) or expected is None or result is None:
        return expected is result
    if isinstance(expected, int | float) and isinstance(result, int | float):
        if isinstance(expected, int) and isinstance(result, int):
            return expected == result
        return math.isclose(expected, result, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, list | tuple) and isinstance(result, list):
        return len(expected) == len(result) and all(map(_same_value, expected, result))
    if isinstance(expected, dict) and isinstance(result, dict):
        return expected.keys() == result.keys() and all(_same_value(expected[key], result[key]) for key in expected)
    return type(expected) is type(result) and expected == result
