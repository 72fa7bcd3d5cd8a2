"""Prompt templates against the published text."""

from __future__ import annotations

import pytest

from r1mega.data.templates import prompt_ids, prompt_text
from r1mega.data.toy_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
PUBLISHED = (  # DeepSeek-R1, arXiv 2501.12948, Table 1
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


def test_r1_zero_is_the_published_prompt_with_the_question_in_place() -> None:
    assert prompt_text("r1_zero", "What is {2}+2?", TOKENIZER) == PUBLISHED.replace("{prompt}", "What is {2}+2?")


def test_plain_is_the_question() -> None:
    assert prompt_text("plain", "2+2", TOKENIZER) == "2+2"


def test_chat_is_the_tokenizers_own_template_and_adds_no_second_beginning() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert prompt_text("chat", "2+2", tokenizer) == "<bos>[user]2+2[assistant]"
    assert prompt_ids("chat", "2+2", tokenizer).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["r1_zero", "plain"])
def test_ids_decode_to_the_text(template: str) -> None:
    assert TOKENIZER.decode(prompt_ids(template, "2+2", TOKENIZER)) == prompt_text(template, "2+2", TOKENIZER)


def test_a_base_model_has_no_chat_template() -> None:
    with pytest.raises(ValueError, match="has no chat template; use template 'r1_zero' or 'plain'"):
        prompt_text("chat", "2+2", TOKENIZER)


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="one of r1_zero, plain, chat, got 'zero'"):
        prompt_text("zero", "2+2", TOKENIZER)
