"""Supervised examples: the mask, the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.data.sft import SftRow, iter_sft, tokenize_sft
from r1mega.data.templates import prompt_ids
from r1mega.data.toy_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS = [
    SftRow(id=f"f:{n}", prompt=f"{n}+1", response=f" <think> . </think> <answer> {n + 1} </answer>") for n in range(9)
]


def test_rows_are_read_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "1+1", "response": " 2"}\n', encoding="utf-8")
    assert list(iter_sft(path)) == [SftRow(id=f"{path}:1", prompt="1+1", response=" 2")]
    path.write_text('{"prompt": "1+1", "answer": " 2"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"sft.jsonl:1: key 'response' is missing"):
        list(iter_sft(path))


def test_the_loss_falls_on_the_response_and_the_end_of_sequence() -> None:
    example = tokenize_sft(ROWS[:1], TOKENIZER, "r1_zero", max_tokens=64)[0]
    prompt = prompt_ids("r1_zero", "0+1", TOKENIZER)
    learned = [token for token, mask in zip(example.token_ids, example.loss_mask, strict=True) if mask]
    assert list(example.token_ids) == prompt + learned
    assert TOKENIZER.decode(learned) == ROWS[0].response + TOKENIZER.eos_token
    assert example.loss_mask == (0,) * len(prompt) + (1,) * len(learned)


def test_an_example_over_the_limit_is_refused() -> None:
    # r1_zero prompt of a 3 character question: 5 tokens; response: 4 tags, ".", "1", end of sequence: 7 tokens.
    assert len(tokenize_sft(ROWS[:1], TOKENIZER, "r1_zero", max_tokens=12)[0].token_ids) == 12
    with pytest.raises(
        ValueError, match=r"f:0: prompt and response have 12 tokens .* the limit is 11; raise sft.max_length"
    ):
        tokenize_sft(ROWS[:1], TOKENIZER, "r1_zero", max_tokens=11)


def test_a_tokenizer_without_an_end_of_sequence_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenize_sft(ROWS, tokenizer, "plain", max_tokens=64)
