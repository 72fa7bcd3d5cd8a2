"""A conversation as pieces of text, by the tokenizer's chat template: what is learned, and what is context.

A template may change what stands in an answer; DeepSeek-R1's leaves its thinking out. So the template is asked with a
mark in the place of each answer, and the answers are put where the marks stand, untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
_THOUGHT = "</think>"
_MARK = "\ue000answer {}\ue001"  # of characters for private use


@dataclass(frozen=True)
class Message:
    """What one side says; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Text that is tokenized by itself, as an engine is given a prompt and generates behind it.

    An `is_learned` piece is an answer; the first token of the piece behind it, which ends the turn, is learned too.
    """

    text: str
    is_learned: bool
    ends_turn: bool = False  # begins with the token that ends the answer before it


def messages_of(place: str, value: object) -> tuple[Message, ...]:
    """The messages of a row. Raises ValueError naming the place where they are not a conversation that ends with an
    answer."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: 'messages' must be a list of {{role, content}}, got {str(value)[:80]!r}")
    messages = []
    for number, entry in enumerate(value):
        at = f"{place}: messages[{number}]"
        if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
            raise ValueError(f"{at}: an object with 'role' and 'content' is expected, got {str(entry)[:80]!r}")
        role, content = entry["role"], entry["content"]
        if role not in ROLES:
            raise ValueError(f"{at}: 'role' must be one of {', '.join(ROLES)}, got {str(role)[:80]!r}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{at}: 'content' must be text that is not blank, got {str(content)[:80]!r}")
        if role == "assistant" and (not messages or messages[-1].role == "assistant"):
            raise ValueError(f"{at}: an answer must follow a message of the user")
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise ValueError(f"{place}: the last of 'messages' must be an answer (role assistant), got {messages[-1].role}")
    return tuple(messages)


def pieces_of(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, keeps_thinking: bool, place: str
) -> list[Piece]:
    """The conversation as the chat template lays it out, cut before and behind every answer.

    What the template opens an answer with when it asks for one (R1's: `<think>` and a line feed) is context where the
    answer begins with it. Without `keeps_thinking` every answer but the last loses what stands up to `</think>`, as
    R1's template has it; an answer that lost something is context alone, since nobody would be taught to answer without
    thinking.

    Raises ValueError, naming the place, where the template does not show every answer once, or writes in front of one
    what it does not write when it asks for one.
    """
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    marked = [{"role": message.role, "content": message.content} for message in messages]
    for number in answers:
        marked[number]["content"] = _MARK.format(number)
    rest = tokenizer.apply_chat_template(marked, tokenize=False)
    asked = tokenizer.apply_chat_template(marked[: answers[-1]], tokenize=False, add_generation_prompt=True)
    before_last = rest.partition(_MARK.format(answers[-1]))[0]
    if not asked.startswith(before_last):
        raise ValueError(
            f"{place}: the chat template writes {before_last[-40:]!r} in front of the last answer, and {asked[-40:]!r} "
            "when it asks for one; such a template can not be learned from row by row; use another one"
        )
    opening, pieces = asked[len(before_last) :], []
    for number in answers:
        context, found, rest = rest.partition(_MARK.format(number))
        if not found or _MARK.format(number) in rest:
            raise ValueError(f"{place}: the chat template does not show messages[{number}] once; use another one")
        text, is_learned = messages[number].content, True
        if not keeps_thinking and number != answers[-1] and _THOUGHT in text:
            text, is_learned = text.rpartition(_THOUGHT)[2], False
        if opening and text.startswith(opening) and len(text) > len(opening):
            context, text = context + opening, text[len(opening) :]
        pieces += [Piece(context, False, ends_turn=bool(pieces)), Piece(text, is_learned)]
    return [*pieces, Piece(rest, False, ends_turn=True)]
