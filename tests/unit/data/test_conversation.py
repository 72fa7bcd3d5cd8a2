"""Conversations: which tokens are learned, against transformers' own mask and masks worked out by hand."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1mega.data.conversation import messages_of
from r1mega.data.sft import SftRow, row_of, tokenize_sft

# ChatML as Qwen2.5 writes it, with the blocks that transformers' own mask goes by.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What DeepSeek-R1's template does: every answer loses its thinking, and an answer that is asked for opens with it.
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<U>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<A>' + content + eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
TALK = [
    ("system", "Be brief."),
    ("user", "1+1?"),
    ("assistant", "<think>\none and one</think>2"),
    ("user", "2+2?"),
    ("assistant", "<think>\ntwo twice</think>4"),
]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<U>", "<A>", "<think>", "</think>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def row(*talk: tuple[str, str]) -> SftRow:
    return row_of("f:1", {"messages": [{"role": role, "content": content} for role, content in talk]})


def learned(tokenizer, example) -> list[str]:
    """The runs of tokens that are learned, as text."""
    runs, before = [], 0
    for token, mask in zip(example.token_ids, example.loss_mask, strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(token)
        before = mask
    return [tokenizer.decode(run) for run in runs]


def test_the_mask_is_that_of_transformers():
    tokenizer = tokenizer_of(CHATML)
    (example,) = tokenize_sft([row(*TALK)], tokenizer, "chat", None)
    messages = [{"role": role, "content": content} for role, content in TALK]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(theirs["input_ids"]), list(theirs["assistant_masks"])
    # nothing is learned from the line feed that the template writes behind the last answer
    assert mask[-1] == 0 and tokenizer.decode(ids[-1:]) == "\n"
    assert list(example.token_ids) == ids[:-1]
    assert list(example.loss_mask) == mask[:-1]
    # the mask has a hole: a mask of as many tokens at the end is not this one
    assert learned(tokenizer, example) == [f"{TALK[2][1]}<|im_end|>", f"{TALK[4][1]}<|im_end|>"]
    count = sum(mask)
    assert list(example.loss_mask) != [0] * (len(ids) - 1 - count) + [1] * count


def test_thinking_stays_where_the_template_would_cut_it():
    tokenizer = tokenizer_of(R1)
    (example,) = tokenize_sft([row(*TALK)], tokenizer, "chat", None)
    text = tokenizer.decode(example.token_ids)
    assert text == ("<s>Be brief.<U>1+1?<A><think>\none and one</think>2</s><U>2+2?<A><think>\ntwo twice</think>4</s>")
    # the template opens an answer with `<think>`, a line feed: an engine is given those, the model does not learn them
    assert learned(tokenizer, example) == ["one and one</think>2</s>", "two twice</think>4</s>"]
    # control: the template itself shows no thinking
    messages = [{"role": role, "content": content} for role, content in TALK]
    assert "twice" not in tokenizer.apply_chat_template(messages, tokenize=False)


def test_past_thinking_is_cut_where_it_is_asked():
    tokenizer = tokenizer_of(R1)
    (example,) = tokenize_sft([row(*TALK)], tokenizer, "chat", None, keeps_thinking=False)
    assert tokenizer.decode(example.token_ids) == "<s>Be brief.<U>1+1?<A>2</s><U>2+2?<A><think>\ntwo twice</think>4</s>"
    assert learned(tokenizer, example) == ["two twice</think>4</s>"], "an answer cut short is not learned"
    plain = row(("user", "Hello"), ("assistant", "Hello!"), *TALK[1:2], ("assistant", "<think>\n.</think>2"))
    (example,) = tokenize_sft([plain], tokenizer, "chat", None, keeps_thinking=False)
    assert learned(tokenizer, example) == ["Hello!</s>", ".</think>2</s>"], "one that never thought is"


@pytest.mark.parametrize("template", [CHATML, R1])
def test_one_turn_is_the_prompt_and_its_response(template):
    """The two forms of a row give the same tokens and the same mask, where the turn ends with the end of sequence."""
    tokenizer = tokenizer_of(template.replace("<|im_end|>", "</s>"))
    opening = "<think>\n" if template is R1 else ""
    rows = [SftRow("f:1", "1+1?", "easy</think>2"), row(("user", "1+1?"), ("assistant", f"{opening}easy</think>2"))]
    first, second = tokenize_sft(rows, tokenizer, "chat", None)
    assert first == second
    assert learned(tokenizer, first) == ["easy</think>2</s>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' must be a list"),
        ([], "'messages' must be a list"),
        ([{"role": "user"}], r"messages\[0\]: an object with 'role' and 'content'"),
        (
            [{"role": "tool", "content": "x"}],
            r"messages\[0\]: 'role' must be one of system, user, assistant, got 'tool'",
        ),
        ([{"role": "user", "content": " "}], r"messages\[0\]: 'content' must be text that is not blank"),
        ([{"role": "user", "content": "x"}], "the last of 'messages' must be an answer"),
        ([{"role": "assistant", "content": "x"}], r"messages\[0\]: an answer must follow"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ValueError, match=f"^f:1: {message}"):
        messages_of("f:1", messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("+ '<|im_end|>'", ""), "behind an answer; a special token that ends it is expected"),
        ("{{ messages[-1]['content'] }}", r"does not show messages\[2\] once"),
        ("{% if not add_generation_prompt %}x{% endif %}" + CHATML, "in front of the last answer"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        tokenize_sft([row(*TALK)], tokenizer_of(template), "chat", None)


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="the template is 'plain', the tokenizer has one; set data.template=chat"):
        tokenize_sft([row(*TALK)], tokenizer_of(R1), "plain", None)
    with pytest.raises(ValueError, match="f:1: has 'messages' and 'prompt'; give the one or the other"):
        row_of("f:1", {"messages": [], "prompt": "x"})
