"""Fields of rejection sampling (stage.loop=reject): see schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from r1mega.config.choices import ResponseChoice, ResponseForm


@dataclass
class CurateConfig:
    name: str = "rejection"
    """Name of this way of collecting, in the provenance of every row."""
    samples: int = 16
    """Responses to each question (R1: several; how many is not published, this default is ours)."""
    prompt: str = "{question}"
    """What the model is given, before data.template: {question}, {examples}, and any column of the row in braces, such
    as {response} to have one rewritten."""
    opening: str = ""
    """Text that begins every response: it ends the prompt, and stands before what is generated in the row."""
    cut_at: list[str] = field(default_factory=list)
    """Texts that end a response and do not stay in it, such as the next question after a few-shot answer."""
    domain: str | None = None
    """Domain of the rows that name none; null: math."""
    examples: str | None = None
    """JSONL file of {prompt, response} rows, of which some are shown with each question (few-shot prompting)."""
    num_examples: int = 2
    """So many are shown: the first ones of the file that are not the question itself (ours)."""
    example: str = "Question: {prompt}\nAnswer: {response}"
    """How each of them is written; blank lines part them."""
    trivial_words: int = 0
    """Questions of at most so many words are not asked where their row has a `response`: that is kept as it stands (R1
    gives queries such as "hello" no chain of thought; the limit is ours)."""
    unjudged: bool = False
    """Keep responses to questions that neither a rule nor a judge decides; without it such questions are refused."""
    form: ResponseForm = ResponseForm.think
    """What a kept response looks like: `think` (thinking up to </think>, then a summary), `r1_zero` (the format that
    R1-Zero is rewarded for) or `any`."""
    min_language: float = 0.0
    """Least share of the words of the thinking in the wanted language, as reward.language measures it; 0 asks for none
    (R1 drops mixed languages; its limit is not published)."""
    max_paragraph_words: int = 0
    """Words of the longest paragraph of the thinking; 0 takes any (R1 drops long ones; its limit is not published)."""
    code_blocks: bool = True
    """Keep responses with fenced code in their thinking (R1 drops them)."""
    max_repetition: float = 1.0
    """Largest share of passages of a response that stood in it before, as reward.repetition measures it (ours)."""
    min_thinking_words: int = 0
    """Least words of the thinking (ours)."""
    per_prompt: int = 0
    """Kept responses to a question at most, 0: all (ours)."""
    choose: ResponseChoice = ResponseChoice.shortest
    """Which of them are kept: the shortest, the first ones, or some at random, by run.seed (ours)."""
    benchmarks: list[str] = field(default_factory=list)
    """JSONL files of what is evaluated on: questions that share an n-gram with them are not asked."""
    benchmark_keys: list[str] = field(default_factory=lambda: ["question", "problem", "prompt", "answer", "solution"])
    """Their columns that count, each on its own; a row must have text in one."""
    ngram: int = 10
    """Words in a row that make an overlap (R1: 10)."""
    check_responses: bool = False
    """Hold responses against the benchmarks too (ours)."""
    special_tokens: list[str] = field(default_factory=list)
    """Two texts: kept responses are rewritten as the first, the reasoning, the second, the summary (R1's cold start:
    |special_token|<reasoning_process>|special_token|<summary>). Empty: responses stay as they are."""
