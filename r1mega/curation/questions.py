"""What a rejection sampling asks: the questions of a file, each with the text that a model is given.

The text is a template: the question, examples of other questions with their responses (few-shot prompting), columns of
the question's own row (a response to be rewritten).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1mega.curation.decontaminate import Benchmarks
from r1mega.curation.texts import normalised, words
from r1mega.data.domains import read_facts
from r1mega.data.jsonl import read_rows
from r1mega.data.order import fingerprint
from r1mega.data.templates import filled
from r1mega.types import Prompt

TRIVIAL, CONTAMINATED = "trivial", "contaminated"


@dataclass(frozen=True)
class Asking:
    """How rows become questions.

    Args:
        template: what a model is given, with `{question}`, `{examples}` and columns of the row in braces.
        domain: of rows that name none; None: math, as everywhere.
        examples: (prompt, response) of the file of examples, of which `num_examples` are shown, each as `example`.
        trivial_words: questions of so few words and a response of their own are not asked: that is kept.
    """

    question_key: str = "question"
    answer_key: str = "answer"
    template: str = "{question}"
    domain: str | None = None
    examples: Sequence[tuple[str, str]] = ()
    num_examples: int = 0
    example: str = "Question: {prompt}\nAnswer: {response}"
    trivial_words: int = 0


@dataclass(frozen=True)
class Question:
    """A question and `text`, what is asked. `given` is the response of its own row, "" where it has none; `left_out`
    says why it is not asked, "" where it is."""

    prompt: Prompt
    text: str
    given: str = ""
    left_out: str = ""


def read_questions(path: str, asking: Asking, benchmarks: Benchmarks | None = None) -> list[Question]:
    """The questions of a JSONL file in its order. Raises ValueError naming `path:line` for a row that is none."""
    found = []
    for line, row in read_rows(path, (asking.question_key,)):
        place, facts = f"{path}:{line}", row
        if asking.domain is not None:
            facts = {"domain": asking.domain} | row
        prompt = Prompt(id=place, question=row[asking.question_key], **read_facts(place, facts, asking.answer_key))
        given = row.get("response", "")
        if not isinstance(given, str):
            raise ValueError(f"{place}: 'response' must be text, got {str(given)[:80]!r}")
        special = {"question": prompt.question, "examples": _examples(asking, prompt.question)}
        is_trivial = bool(given.strip()) and len(words(prompt.question)) <= asking.trivial_words
        text = filled(place, asking.template, row, special)
        found.append(Question(prompt, text, given, TRIVIAL if is_trivial else ""))
    if benchmarks is None:
        return found
    matches = benchmarks.matches([question.prompt.question for question in found])
    return [
        Question(one.prompt, one.text, one.given, CONTAMINATED if match else one.left_out)
        for one, match in zip(found, matches, strict=True)
    ]


def read_examples(path: str) -> list[tuple[str, str]]:
    """(prompt, response) of a JSONL file. Raises ValueError naming `path:line`."""
    return [(row["prompt"], row["response"]) for _, row in read_rows(path, ("prompt", "response"))]


def digest(questions: Sequence[Question]) -> str:
    """Of all that decides what is asked and how it is judged; not of what is left out, which may change."""
    return fingerprint(json.dumps([asdict(one.prompt), one.text], sort_keys=True) for one in questions)


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Keep the questions as they are asked, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in questions)


def load_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote."""
    found = []
    for _, row in read_rows(path, ()):
        prompt = row.pop("prompt")
        lists = {name: tuple(value) for name, value in prompt.items() if isinstance(value, list)}
        found.append(Question(Prompt(**prompt | lists), **row))
    return found


def row_of(prompt: Prompt) -> dict[str, Any]:
    """What a row says of its question besides the text, for another pass to read."""
    answers = [prompt.answer, *prompt.other_answers]
    facts: dict[str, Any] = {"domain": prompt.domain}
    if prompt.answer:
        facts["answer"] = answers if len(answers) > 1 else prompt.answer
    for name in ("options", "tests"):
        if getattr(prompt, name):
            facts[name] = list(getattr(prompt, name))
    return facts | ({"language": prompt.language} if prompt.language else {})


def _examples(asking: Asking, question: str) -> str:
    """The examples that are shown with a question: the first ones that are not the question itself."""
    if not asking.num_examples:
        return ""
    own = normalised(question)
    others = [(prompt, response) for prompt, response in asking.examples if normalised(prompt) != own]
    shown = others[: asking.num_examples]
    return "\n\n".join(
        filled("example", asking.example, {}, {"prompt": prompt, "response": response}) for prompt, response in shown
    )
