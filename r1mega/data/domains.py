"""What a row says of its question besides the text: domain, answers, options, tests, language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from r1mega.types import DOMAINS, WITHOUT_ANSWER

_CHOSEN = ("stem", "choice")
_NUM_OPTIONS = (4, 8)
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IO = {"input", "output"}
_CALL = {"function", "arguments", "output"}


def read_facts(place: str, row: Mapping[str, Any], answer_key: str) -> dict[str, Any]:
    """The fields of a Prompt besides id and question. Raises ValueError naming `place` for what is missing or wrong.

    Keys of the row: `answer_key` (text, a number, or a list of answers that are all right; the domains code, general,
    helpful and harmless need none), `domain` (math where it is left out), `options` (4 to 8 texts for stem and choice;
    logic may have them), `tests` (for code), `language` (to think in).
    """
    domain = row.get("domain", "math")
    if domain not in DOMAINS:
        raise ValueError(f"{place}: 'domain' must be one of {', '.join(DOMAINS)}, got {str(domain)[:80]!r}")
    answers = _answers(place, row, answer_key, needed=domain not in ("code", *WITHOUT_ANSWER))
    options = _options(place, row.get("options"), needed=domain in _CHOSEN)
    if options and domain not in (*_CHOSEN, "logic"):
        raise ValueError(f"{place}: a question of domain {domain} has no 'options'; set 'domain' to stem or choice")
    tests = row.get("tests")
    if domain == "code" or tests is not None:
        check_tests(place, tests)
    language = row.get("language")
    if language is not None and not isinstance(language, str):
        raise ValueError(f"{place}: 'language' must be text such as 'en', got {str(language)[:80]!r}")
    return {
        "answer": answers[0] if answers else "",
        "other_answers": tuple(answers[1:]),
        "domain": domain,
        "options": options,
        "tests": tuple(tests or ()) if domain == "code" else (),
        "language": language,
    }


def check_tests(place: str, tests: Any) -> None:
    """Raises ValueError, naming `place`, where `tests` is no list of tests as r1mega.reward.code describes them."""
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"{place}: 'tests' must be a list that is not empty, got {str(tests)[:80]!r}")
    for number, test in enumerate(tests, start=1):
        keys = set(test) if isinstance(test, dict) else set()
        if keys == _IO and all(isinstance(test[key], str) for key in _IO):
            continue
        if (
            keys == _CALL
            and isinstance(test["function"], str)
            and _FUNCTION.fullmatch(test["function"])
            and isinstance(test["arguments"], list | dict)
        ):
            continue
        raise ValueError(
            f'{place}: test {number} must be {{"input": text, "output": text}} or {{"function": name, "arguments": '
            f'[...], "output": value}}, got {str(test)[:80]!r}'
        )


def _answers(place: str, row: Mapping[str, Any], key: str, *, needed: bool) -> list[str]:
    given = row.get(key)
    if given is None and not needed and key not in row:
        return []
    if key not in row:
        keys = ", ".join(map(repr, row)) or "(none)"
        raise ValueError(f"{place}: key {key!r} is missing; the keys there are {keys}")
    answers = given if isinstance(given, list) else [given]
    for i, answer in enumerate(answers):
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answers[i] = answer = str(answer)
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{place}: {key!r} must be text that is not blank, or a list, got {str(given)[:80]!r}")
    if not answers:
        raise ValueError(f"{place}: {key!r} must be text that is not blank, or a list, got {str(given)[:80]!r}")
    return answers


def _options(place: str, given: Any, *, needed: bool) -> tuple[str, ...]:
    if given is None and not needed:
        return ()
    low, high = _NUM_OPTIONS
    is_sound = isinstance(given, list) and low <= len(given) <= high
    if not is_sound or not all(isinstance(option, str) and option.strip() for option in given):
        raise ValueError(f"{place}: 'options' must be a list of {low} to {high} texts, got {str(given)[:80]!r}")
    return tuple(given)
