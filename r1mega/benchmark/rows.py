"""The problems of a benchmark: read from a file or from the hub, in one spelling.

Our own rows hold `question`, `answer`, and where there are any `options` (a list) and `tests` (a list); columns of
published sets are named by the benchmark. The answer to a question with options is the letter of the right one, given
as a letter, as its place counted from 0, or as the option's text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from r1mega.benchmark.answers import ALTERNATIVE, LETTERS
from r1mega.data.jsonl import read_rows
from r1mega.data.order import fingerprint
from r1mega.data.templates import filled, look_up
from r1mega.reward.language import LANGUAGES


@dataclass(frozen=True)
class Columns:
    """Where a row's parts stand; `a.b` is the column b inside a. `options` fixed ones win over columns of them."""

    question: str = "question"
    answer: str = "answer"
    options: Sequence[str] = ("options",)
    tests: str = "tests"
    fixed_options: Sequence[str] = ()


@dataclass(frozen=True)
class Problem:
    """One question of a benchmark, as it is asked. `prompt` is the text before the model's own template."""

    id: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    tests: tuple[Any, ...] = field(default=())
    contest: str = ""
    """Of a programming contest: the contest's name, `index` the problem's in it."""
    index: str = ""
    language: str | None = None
    """The one to think in, where the row names it and it is asked for; else it is the question's."""


def read_file(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(`path:line`, row) of a JSONL file. Raises ValueError naming `path:line` as data.jsonl does."""
    return [(f"{Path(path).name}:{line}", row) for line, row in read_rows(path, ())]


def read_hub(name: str, config: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(`name:number`, row) of a set on the Hugging Face hub, through the package `datasets`.

    Raises ValueError where it cannot be had, whatever the reason: not installed, not reachable, gated, renamed.
    """
    try:
        from datasets import load_dataset

        found = load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the hub, its files or its scripts: the user can mend them alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} cannot be had from the hub ({reason})") from error
    return [(f"{name.rpartition('/')[2]}:{number}", dict(row)) for number, row in enumerate(found, start=1)]


def problems_of(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    columns: Columns,
    template: str,
    *,
    asks: str,
    shuffle_seed: int | None = None,
    reads_language: bool = False,
) -> list[Problem]:
    """The problems in rows, each with its prompt: `{column}` in `template` is a column, `{options}` the options.

    `asks` says what a row has to hold: answer, options, tests or nothing. With `shuffle_seed` options are put in an
    order of their own for each problem, which the seed and the problem's place decide. `reads_language` takes a row's
    `language`, where it has one. Raises ValueError naming a row that lacks what is asked for.
    """
    if not rows:
        raise ValueError("the benchmark has no rows; at least one problem is expected")
    found = [
        _problem(place, row, columns, template, asks, None if shuffle_seed is None else f"{shuffle_seed}/{number}")
        for number, (place, row) in enumerate(rows)
    ]
    if not reads_language:
        return found
    languages = [_language(place, row) for place, row in rows]
    return [replace(problem, language=language) for problem, language in zip(found, languages, strict=True)]


def digest(problems: Sequence[Problem]) -> str:
    """A short digest of all that decides what is asked and how it is graded."""
    return fingerprint(json.dumps(_plain(problem), sort_keys=True) for problem in problems)


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Keep the problems as they are asked, one JSON object a line."""
    text = "".join(json.dumps(_plain(problem), ensure_ascii=False) + "\n" for problem in problems)
    path.write_text(text, encoding="utf-8")


def read_problems(path: Path) -> list[Problem]:
    """What `write_problems` wrote."""
    found = [row for _, row in read_rows(path, ())]
    return [Problem(**row | {"options": tuple(row["options"]), "tests": tuple(row["tests"])}) for row in found]


def _problem(
    place: str, row: Mapping[str, Any], columns: Columns, template: str, asks: str, shuffle: str | None
) -> Problem:
    question = _text(place, row, "question" if "question" in row else columns.question)
    options, answer = (), ""
    if asks == "options":
        options = _options(place, row, columns)
        right = _place_of(place, _answer(place, row, columns), options)
        order = list(range(len(options)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        options, answer = tuple(options[i] for i in order), LETTERS[order.index(right)]
    elif asks == "answer":
        found = _answer(place, row, columns)
        answer = ALTERNATIVE.join(map(str, found)) if isinstance(found, list) else str(found)
    tests = _tests(place, row, columns) if asks == "tests" else ()
    return Problem(
        id=str(row.get("id", place)),
        prompt=filled(place, template, row, {"question": question, "options": _shown(options)}),
        answer=answer,
        options=options,
        tests=tests,
        contest=str(row.get("contest", row.get("contest_id", ""))),
        index=str(row.get("index", "")),
    )


def _shown(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _plain(problem: Problem) -> dict[str, Any]:
    """A problem as plain values; a language only where there is one."""
    values = asdict(problem)
    if problem.language is None:
        del values["language"]
    return values


def _language(place: str, row: Mapping[str, Any]) -> str | None:
    language = row.get("language")
    if language is not None and language not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise ValueError(f"{place}: 'language' must be one of {known}, got {str(language)[:80]!r}")
    return language


def _text(place: str, row: Mapping[str, Any], name: str) -> str:
    value = look_up(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name!r} must be text that is not blank; the keys there are {', '.join(row)}")
    return value


def _answer(place: str, row: Mapping[str, Any], columns: Columns) -> Any:
    name = "answer" if look_up(row, columns.answer) is None else columns.answer
    value = look_up(row, name)
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        raise ValueError(f"{place}: {columns.answer!r} must hold the answer; the keys there are {', '.join(row)}")
    return value


def _options(place: str, row: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    if columns.fixed_options:
        return tuple(columns.fixed_options)
    found = row.get("options")
    if not isinstance(found, list):
        found = [look_up(row, name) for name in columns.options]
        if len(found) == 1 and isinstance(found[0], list):
            found = found[0]
    if not 2 <= len(found) <= len(LETTERS) or any(option is None for option in found):
        wanted = ", ".join(columns.options)
        raise ValueError(f"{place}: between 2 and {len(LETTERS)} options are expected, in 'options' or in {wanted}")
    return tuple(str(option).strip() for option in found)


def _place_of(place: str, answer: Any, options: Sequence[str]) -> int:
    """Which option is the right one."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    text = str(answer).strip()
    if len(text) == 1 and text in LETTERS[: len(options)]:
        return LETTERS.index(text)
    if options.count(text) == 1:
        return options.index(text)
    raise ValueError(
        f"{place}: the answer {text[:80]!r} is neither a letter A to {LETTERS[len(options) - 1]}, nor a place from 0, "
        "nor the text of exactly one option"
    )


def _tests(place: str, row: Mapping[str, Any], columns: Columns) -> tuple[Any, ...]:
    name = "tests" if row.get("tests") is not None else columns.tests
    value = look_up(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: {name!r} is text that is not JSON ({error.msg})") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {columns.tests!r} must hold a list of tests; the keys there are {', '.join(row)}")
    return tuple(value)
