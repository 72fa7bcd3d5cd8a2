"""The tokenizer of the toy task: a real Hugging Face fast tokenizer in which every character is one token.

Longer strings that never vary are one token each: the fixed text of the R1-Zero prompt before and after the question,
and the four tags together with the spaces the prompt shows around them. A published R1-Zero prompt so costs two tokens
more than its question, and a response costs four tokens more than its work and its answer.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.data.templates import R1_ZERO_ENDING, R1_ZERO_PREAMBLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
# The spaces are part of the tags: " <think> 1 </think> <answer> 2 </answer>" is four tags, "1" and "2".
TAGS = (" <think> ", " </think> ", "<answer> ", " </answer>")
CHARACTERS = "\n" + "".join(sorted(string.digits + string.ascii_letters + string.punctuation + " "))
VOCAB_MULTIPLE = 32
MAX_LENGTH = 1024  # tokens the toy models are configured for


def build_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer, with ids in a fixed order: special tokens, fixed strings, tags, `words`, characters, reserved ids.

    The vocabulary is filled with reserved tokens up to a multiple of 32, so that it divides under tensor parallelism
    and every id of the model can be decoded. `decode(encode(text)) == text` for any text of printable ASCII and
    newlines; other characters become the unknown token. Each of `words` is one token as well, whatever its characters.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fixed = [R1_ZERO_PREAMBLE, R1_ZERO_ENDING, *TAGS, *words]
    names = [PAD, BOS, EOS, UNKNOWN, *fixed, *CHARACTERS]
    names += [f"<reserved_{index}>" for index in range(-len(names) % VOCAB_MULTIPLE)]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    # Fuse joins tokens as they are; without a decoder the library would put a space between any two.
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer so that `AutoTokenizer.from_pretrained(out)` of transformers 4 and 5 both load it.

    Version 5 writes a class name that version 4, which inference servers may still pin, does not know; the older name
    is understood by both.
    """
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
