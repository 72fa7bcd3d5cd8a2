"""Supervised examples: a prompt with the response the model is to imitate, or a conversation with its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.data.conversation import Message, Piece, messages_of, pieces_of
from r1mega.data.jsonl import iter_lines, parse_object, require_text
from r1mega.data.templates import prompt_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

KEYS = ("prompt", "response")
_BATCH = 512  # texts tokenized at once: what a tokenizer says of them besides takes many times their memory


@dataclass(frozen=True)
class SftRow:
    """One row of the data file; `id` is `path:line`. It has `messages`, or else a prompt and a response."""

    id: str
    prompt: str = ""
    response: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class SftExample:
    """One tokenized example.

    `loss_mask` has one entry per token: 1 where the token is to be learned (an answer and the token that ends it), 0 on
    all else. The first token is never learned.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def row_of(place: str, row: dict[str, Any]) -> SftRow:
    """A JSON object as a row. Raises ValueError naming the place for keys that are missing or malformed."""
    if "messages" in row:
        both = [key for key in KEYS if key in row]
        if both:
            raise ValueError(f"{place}: has 'messages' and {both[0]!r}; give the one or the other")
        return SftRow(id=place, messages=messages_of(place, row["messages"]))
    require_text(place, row, KEYS)
    return SftRow(id=place, prompt=row["prompt"], response=row["response"])


def iter_sft(path: str | Path) -> Iterator[SftRow]:
    """The rows of a JSONL file, one by one.

    Raises ValueError naming `path:line` for an empty file, a malformed line, or a key that is missing or blank.
    """
    for line in iter_lines(path, expected="'prompt', 'response' or 'messages'"):
        place = f"{path}:{line.number}"
        yield row_of(place, parse_object(place, line.raw))


def tokenize_sft(
    rows: Sequence[SftRow],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int | None,
    *,
    limit: str = "sft.max_length",
    keeps_thinking: bool = True,
) -> list[SftExample]:
    """The rows as token ids, in the same order. `limit` is the field that `max_tokens` comes from; None: there is none.

    Prompt and response are tokenized apart, so that the prompt's ids are the very ids an engine is given later.
    Raises ValueError for an example of more than `max_tokens` tokens, a tokenizer without an end-of-sequence token, a
    conversation that the template cannot lay out.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; set `eos_token`")
    pieces = [_pieces(row, tokenizer, template, keeps_thinking) for row in rows]
    flat = [(piece.text, template != "chat" and n == 0) for found in pieces for n, piece in enumerate(found)]
    ids = iter(_encode(flat, tokenizer))
    ends = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    examples = []
    for row, found in zip(rows, pieces, strict=True):
        example = _example(row, [(piece, next(ids)) for piece in found], tokenizer.eos_token_id, ends)
        num_tokens = len(example.token_ids)
        if max_tokens is not None and num_tokens > max_tokens:
            raise ValueError(too_long(row.id, num_tokens, template, max_tokens, limit))
        examples.append(example)
    return examples


def too_long(place: str, num_tokens: int, template: str, max_tokens: int, limit: str) -> str:
    """What is said of an example that is longer than the field `limit` allows."""
    return (
        f"{place}: prompt and response have {num_tokens} tokens with template {template!r}, the limit is {max_tokens}; "
        f"raise {limit} or take this row out of the file"
    )


def _pieces(row: SftRow, tokenizer: PreTrainedTokenizerBase, template: str, keeps_thinking: bool) -> list[Piece]:
    if not row.messages:
        return [Piece(prompt_text(template, row.prompt, tokenizer), False), Piece(row.response, True)]
    if template != "chat" or not tokenizer.chat_template:
        raise ValueError(
            f"{row.id}: 'messages' are laid out by a chat template; the template is {template!r}, the tokenizer has "
            f"{'one' if tokenizer.chat_template else 'none'}; set data.template=chat with a tokenizer that has one"
        )
    return pieces_of(row.messages, tokenizer, keeps_thinking=keeps_thinking, place=row.id)


def _encode(texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, many at once: a fast tokenizer works on them in parallel. With the flag the tokenizer adds
    its own beginning to it, as to plain text; a chat template writes that itself."""
    found: list[list[int]] = [[] for _ in texts]
    for flag in (True, False):
        places = [place for place, (text, adds) in enumerate(texts) if adds is flag and text]
        for start in range(0, len(places), _BATCH):
            part = places[start : start + _BATCH]
            chosen = [texts[place][0] for place in part]
            encoded = tokenizer(chosen, add_special_tokens=flag, return_attention_mask=False, verbose=False)
            for place, ids in zip(part, encoded["input_ids"], strict=True):
                found[place] = ids
    return found


def _example(row: SftRow, pieces: list[tuple[Piece, list[int]]], eos: int, ends: set[int]) -> SftExample:
    tokens: list[int] = []
    mask: list[int] = []
    was_learned = False
    for at, (piece, ids) in enumerate(pieces):
        if piece.ends_turn:
            if not ids or ids[0] not in ends:
                raise ValueError(
                    f"{row.id}: the chat template writes {piece.text[:20]!r} behind an answer; a special token that "
                    "ends it is expected; use another template"
                )
            if at == len(pieces) - 1:
                ids = ids[:1]  # nothing is learned from what would follow
        tokens += ids
        mask += [int(piece.is_learned)] * len(ids)
        if piece.ends_turn:
            mask[len(tokens) - len(ids)] = int(was_learned)
        was_learned = piece.is_learned
    if not row.messages:
        tokens.append(eos)
        mask.append(1)
    return SftExample(tuple(tokens), tuple(mask))
