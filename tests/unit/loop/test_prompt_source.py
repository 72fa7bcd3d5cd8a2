"""What hands out the questions of a run: with data.general two files, else one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.config import choices, schema
from r1mega.data.prompts import PromptSource
from r1mega.loop.wire import load_prompts, prompt_source


@pytest.fixture
def config(tmp_path: Path) -> schema.Config:
    rows = {
        "train": [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(8)],
        "general": [{"question": f"Who is {i}?", "domain": "helpful"} for i in range(8)],
    }
    made = schema.Config()
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    made.data.train, made.data.template = str(tmp_path / "train.jsonl"), choices.Template.plain
    made.reward.preference_from = 4
    return made


def test_general_questions_come_tokenized_from_their_update_on(config, tmp_path: Path, byte_tokenizer) -> None:
    alone = prompt_source(config, load_prompts(config, config.data.train, byte_tokenizer), byte_tokenizer)
    assert isinstance(alone, PromptSource)
    config.data.general, config.data.general_share = str(tmp_path / "general.jsonl"), 0.25
    mixed = prompt_source(config, load_prompts(config, config.data.train, byte_tokenizer), byte_tokenizer)
    alone.at(3)
    mixed.at(3)
    assert mixed.next(4) == alone.next(4)
    mixed.at(4)
    prompts = mixed.next(4)
    assert [prompt.domain for prompt in prompts] == ["math", "math", "math", "helpful"]
    assert all(prompt.token_ids for prompt in prompts)
    config.data.max_prompt_tokens = 5
    with pytest.raises(ValueError, match=r"general\.jsonl:1: the prompt has \d+ tokens"):
        prompt_source(config, prompts, byte_tokenizer)


@pytest.fixture
def byte_tokenizer():
    """One token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
