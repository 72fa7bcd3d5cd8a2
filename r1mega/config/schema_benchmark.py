"""Fields of `r1mega evaluate`: see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from r1mega.config.choices import GraderName, Template


@dataclass
class BenchmarkConfig:
    name: str = ""
    """Name in reports, and by which the paper's own figures are found."""
    data: str | None = None
    """JSONL file of the problems: `question`, `answer`, and `options` or `tests`. Null: from hub."""
    hub: str | None = None
    """The set's name on the Hugging Face hub, read through the package `datasets` where data is not given."""
    hub_config: str | None = None
    """Its configuration there, where it has several."""
    split: str = "test"
    """Its split there."""
    question_key: str = "question"
    """Column of the question, where a row has no `question`; `a.b` is the column b inside a."""
    answer_key: str = "answer"
    """Column of the answer: text or a number; of options a letter, a place counted from 0, or the text of one."""
    options_keys: list[str] = field(default_factory=lambda: ["options"])
    """Columns of the options, or the one that lists them, where a row has no `options`."""
    options: list[str] = field(default_factory=list)
    """The options where they are the same for every question."""
    tests_key: str = "tests"
    """Column of the tests, where a row has no `tests`."""
    shuffle_options: bool = False
    """Put the options in an order of run.seed's for each question; false keeps the file's."""
    prompt: str = "{question}"
    """The text asked: {question}, {options} (`A) ...` a line), or any other column in braces."""
    template: Template = Template.chat
    """How that text becomes a prompt: the tokenizer's chat template, R1-Zero's conversation, or as it is."""
    max_prompt_tokens: int = 8192
    """Longest prompt accepted (ours)."""
    grader: GraderName = GraderName.math
    """What scores a response: `math` (math-verify on the last box or answer tag), `choice` (the letter of the last
    `Answer: X`), `drop` (F1 of the words of the last `Answer: ...`), `code` (tests), `none` (responses are kept).
    What a `judge` or a `harness` of its own grades is refused, with what is needed instead."""
    samples: int = 1
    """Responses to each problem (R1's k: 64 for AIME and GPQA, 16 for MATH-500 and Codeforces, 8 for LiveCodeBench)."""
    pass_at: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32, 64])
    """The k of pass@k and cons@k in the report, those up to `samples`."""
    temperature: float = 0.6
    """Sampling temperature (R1: 0.6); 0 is greedy."""
    top_p: float = 0.95
    """Nucleus sampling mass (R1: 0.95)."""
    max_tokens: int = 32768
    """Longest response in tokens (R1: 32,768)."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response and stay in it."""
    limit: int | None = None
    """Ask the first so many problems only; null asks all."""
    bootstrap: int = 2000
    """Resamples of the problems that the 95% intervals are taken from (ours)."""
    standings: str | None = None
    """JSONL file of contests and their final standings, from which a rating is reckoned; see docs/evaluation.md."""
    attempts: int = 8
    """Samples of a problem handed in during one contest, one after the other until one is right (CodeElo: 8)."""
    readability: bool = False
    """Report besides the shares of responses that are well formed and readable, and the share of the thinking's words
    that are in the language of the question, or of a row's `language`; see docs/evaluation.md."""
    plot: bool = True
    """Draw benchmark.png."""
    judge: str | None = None
    """Who grades it where no grader here does: the model or the harness that the paper used."""
    harness: str | None = None
    """The command that grades kept responses, or runs the benchmark as a whole; printed where it is refused here."""
