"""Each filter by hand-worked responses, and that it lets through what it is not about."""

from __future__ import annotations

import pytest

from r1mega.curation.filters import FILTERS, Candidate, Limits, sieve

SOUND = "<think>First we add the tens, then the ones.</think> It is 42."
STRICT = Limits(
    form="think", min_language=0.9, max_paragraph_words=12, code_blocks=False, max_repetition=0.2, min_thinking_words=3,
    special_tokens=("|t|", "|t|"),
)  # fmt: skip


def candidate(response: str = SOUND, **values: object) -> Candidate:
    values = {"parts": {"accuracy": 1.0}, **values}
    return Candidate("p", 0, "What is 40+2?", response, **values)


def test_a_sound_response_passes_everything() -> None:
    assert sieve(candidate(), STRICT) == (None, tuple(FILTERS))


@pytest.mark.parametrize(
    ("reason", "one"),
    [
        ("failed", candidate(error="accuracy: the worker died")),
        ("cut_off", candidate(cut_off=True)),
        ("wrong", candidate(parts={"accuracy": 0.0})),
        ("malformed", candidate("First we add the tens. It is 42.")),
        ("malformed", candidate("<think>a b c</think> ")),
        ("malformed", candidate("<think> </think> 42")),
        ("malformed", candidate("Well. <think>a b c</think> 42")),
        ("malformed", candidate("<think>a b c</think> 42 </think> 43")),
        # 8 of 9 words are English: 0.89
        ("mixed_language", candidate("<think>First we add the tens, then the единицы.</think> It is 42.")),
        ("long_paragraph", candidate(f"<think>{'we add one more ' * 4}</think> It is 42.")),  # 16 words
        ("code_block", candidate("<think>We run it.\n```python\nprint(42)\n```\n</think> It is 42.")),
        (
            "repetition",
            candidate("<think>" + 3 * "yes it is. yes it is. yes it is. yes it is.\n\n" + "</think> 42"),
        ),
        ("short_thinking", candidate("<think>Easy one</think> It is 42.")),
        ("special_token", candidate("<think>First |t| the tens.</think> It is 42.")),
    ],
)
def test_each_reason(reason: str, one: Candidate) -> None:
    found, passed = sieve(one, STRICT)
    assert found == reason and passed == tuple(FILTERS)[: list(FILTERS).index(reason)]


def test_what_is_left_open_drops_nothing() -> None:
    for response in ("First.", "<think>да</think> 42", f"<think>{'a ' * 999}\n```\n```</think>", SOUND * 3):
        assert sieve(candidate(response), Limits())[0] is None
    assert sieve(candidate("  "), Limits())[0] == "malformed"


def test_code_after_the_thinking_is_the_answer() -> None:
    assert sieve(candidate("<think>We write a loop now.</think>\n```python\nprint(42)\n```"), STRICT)[0] is None


def test_thinking_without_words_is_in_no_language() -> None:
    """Of formulas alone, and of figures, nobody can say that languages are mixed; of a foreign word one can."""
    limits = Limits(min_language=0.9)
    for chain in ("1+1=2", "$x^2 = 4$"):
        assert sieve(candidate(f"<think>{chain}</think> 2", parts={"accuracy": 1, "language": 0.0}), limits) == (
            None, ("failed", "cut_off", "wrong"),
        )  # fmt: skip
    assert sieve(candidate("<think>да</think> 2"), limits)[0] == "mixed_language"
    russian = candidate("<think>Сначала складываем.</think> 42", language="ru")
    assert sieve(russian, limits)[0] is None


def test_what_the_rewards_have_measured_is_not_measured_again() -> None:
    """The language and repetition parts are believed, whatever the text."""
    assert sieve(candidate(parts={"language": 0.5}), Limits(min_language=0.6))[0] == "mixed_language"
    assert sieve(candidate(parts={"repetition": -0.3}), Limits(max_repetition=0.2))[0] == "repetition"


def test_the_judge_decides_where_it_judges() -> None:
    assert sieve(candidate(parts={"accuracy": 0.0, "judge": 1.0}), Limits())[0] is None
    assert sieve(candidate(parts={"accuracy": 1.0, "judge": 0.0}), Limits())[0] == "wrong"
    unjudged = candidate(domain="general", parts={"format": 1.0})
    assert sieve(unjudged, Limits()) == (None, ("failed", "cut_off"))


def test_given_rows_were_neither_scored_nor_need_they_think() -> None:
    assert sieve(candidate("Hello!", parts={}, given=True), STRICT) == (None, ("malformed",))
    assert sieve(candidate(" ", parts={}, given=True), STRICT)[0] == "malformed"


def test_r1_zero_form() -> None:
    limits = Limits(form="r1_zero")
    assert sieve(candidate("<think>a</think> <answer>42</answer>"), limits)[0] is None
    assert sieve(candidate(SOUND), limits)[0] == "malformed"
    with pytest.raises(ValueError, match="must be one of any, think, r1_zero"):
        Limits(form="xml")
