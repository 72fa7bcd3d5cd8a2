"""How a question becomes the token ids an engine is given.

`r1_zero` is the published prompt of DeepSeek-R1-Zero (arXiv 2501.12948, Table 1), `plain` is the bare question, `chat`
is the tokenizer's own chat template with its generation prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R1_ZERO_PREAMBLE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: "
)
R1_ZERO_ENDING = ". Assistant:"

TEMPLATES = ("r1_zero", "plain", "chat")


def prompt_text(template: str, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the prompt.

    Raises ValueError for an unknown template, or for `chat` when the tokenizer has no chat template.
    """
    if template == "r1_zero":
        return f"{R1_ZERO_PREAMBLE}{question}{R1_ZERO_ENDING}"
    if template == "plain":
        return question
    if template == "chat":
        if not tokenizer.chat_template:
            raise ValueError(
                f"template 'chat' was asked for, but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "use template 'r1_zero' or 'plain' with a base model"
            )
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")


def prompt_ids(template: str, question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of the prompt.

    The tokenizer adds its own beginning-of-sequence token to plain text; a chat template writes that token itself.
    Raises ValueError as `prompt_text`.
    """
    text = prompt_text(template, question, tokenizer)
    return tokenizer.encode(text, add_special_tokens=template != "chat")


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, `a.b` being b inside a; None where it is absent."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def filled(place: str, template: str, row: Mapping[str, Any], special: Mapping[str, str]) -> str:
    """The template with what it names in braces filled in: a key of `special`, else a column of the row. Braces that
    name no column stay as they are (LaTeX is full of them).

    Raises ValueError, naming `place`, where a column is asked for that is not there.
    """
    parts, rest = [], template
    while "{" in rest:
        before, _, after = rest.partition("{")
        name, closing, behind = after.partition("}")
        value = special.get(name, look_up(row, name) if name else None)
        if closing and value is not None:
            parts += [before, str(value)]
            rest = behind
        elif closing and name.replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"{place}: the prompt asks for {name!r}; the keys there are {', '.join(row)}")
        else:
            parts += [before, "{"]
            rest = after
    return "".join([*parts, rest])
