"""The same question answered by several stages, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from r1mega.pipeline.page.input import Sample, Stage
from r1mega.pipeline.page.markup import Child, Element, details, el
from r1mega.pipeline.page.text import Unit, breakable, figure, plural

_OPEN, _CLOSE = "<think>", "</think>"
_REWARD = Unit(is_share=False, digits=2)
_SHORT = 200  # characters of thinking that are shown at once


def samples(stages: Sequence[Stage]) -> Element:
    """Questions that most stages answered come first; a column for each stage that answered."""
    answers: dict[str, list[tuple[str, Sample]]] = {}
    for stage in stages:
        for sample in stage.samples:
            answers.setdefault(sample.question, []).append((stage.name, sample))
    if not answers:
        return el("p", "none", cls="none")
    ranked = sorted(answers.items(), key=lambda item: -len({name for name, _ in item[1]}))
    several = [_question(*item) for item in ranked if len({name for name, _ in item[1]}) > 1]
    alone = [_question(*item) for item in ranked[len(several) :]]
    if not several:
        return el("div", el("p", "No question was answered by several stages."), *alone)
    title = f"{plural(len(alone), 'question')} that one stage alone answered"
    return el("div", *several, details(title, *alone) if alone else None)


def _question(question: str, given: Sequence[tuple[str, Sample]]) -> Element:
    columns: dict[str, list[Sample]] = {}
    for name, sample in given:
        columns.setdefault(name, []).append(sample)
    cells = [el("div", el("h4", breakable(name)), *map(_answer, own), cls="answer") for name, own in columns.items()]
    return el(
        "article",
        el("p", question, cls="question", dir="auto"),
        el("div", *cells, cls="answers", tabindex=0, aria_label="answers by stage"),
    )


def _answer(sample: Sample) -> Element:
    thinking, rest = split(sample.response)
    children: list[Child] = []
    if thinking:
        letters = f"thinking, {plural(len(thinking), 'character')}"
        letters += "" if _CLOSE in thinking else ", not ended"
        children.append(details(letters, el("pre", thinking, dir="auto"), open=len(thinking) <= _SHORT))
    children.append(el("pre", rest, dir="auto") if rest else el("p", "nothing after the thinking", cls="none"))
    tail: list[Child] = ["reward ", figure(sample.reward, _REWARD)]
    if sample.seed:
        tail.append(f" · seed {sample.seed}")
    return el("div", *children, el("p", *tail, cls="reward"), cls="one")


def split(response: str) -> tuple[str, str]:
    """The thinking with its tags, up to the last `</think>` (all where it never ends), and what follows it; without
    white space around either."""
    if _CLOSE in response:
        before, tag, after = response.rpartition(_CLOSE)
        return (before + tag).strip(), after.strip()
    if _OPEN in response:
        return response.strip(), ""
    return "", response.strip()
