"""The language reward: the share of the words of the thinking that are in the wanted language.

R_language = Num(Words_target) / Num(Words) (DeepSeek-R1, arXiv 2501.12948v2, Eq. 7). What a word is, and that the
wanted language is that of the question, is not published and ours: a word is a run of letters, told by its script;
Chinese runs are cut into words by jieba; code, formulas, addresses and single Latin letters (`x`, `n`) are no words.

Languages that share a script cannot be told apart by it: `en` stands for every language in Latin letters.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import regex

from r1mega.reward.answer import thoughts
from r1mega.types import Prompt, Score

if TYPE_CHECKING:
    import jieba

# Language -> its script, as Unicode names it. The first is that of a question without words.
LANGUAGES = {
    "en": "Latin",
    "zh": "Han",
    "ru": "Cyrillic",
    "ko": "Hangul",
    "ar": "Arabic",
    "el": "Greek",
    "he": "Hebrew",
    "hi": "Devanagari",
}
QUICK_CHARS = 20_000

# Each alternative takes what it has matched, and an unclosed one runs to the end of its paragraph or of the text: one
# pass over the text is enough whatever stands in it. `$` as pandoc reads it, so that "$5 and $6" are prices.
_NO_PROSE = regex.compile(
    r"""
      ```.*?(?:```|\Z)                                          # code blocks
    | `[^`\n]+`                                                 # inline code
    | \$\$.*?(?:\$\$|\Z)                                        # formulas
    | \$(?=\S)[^$\n]*+(?<=\S)\$(?![0-9])
    | \\\((?:(?!\\\)|\n\n).)*+(?:\\\))?
    | \\\[(?:(?!\\\]|\n\n).)*+(?:\\\])?
    | \\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z)
    | \\boxed\s*\{[^{}\n]*\}
    | \\[A-Za-z]+
    | https?://\S+
    """,
    regex.VERBOSE | regex.DOTALL,
)
_RUN = regex.compile(r"(?P<han>\p{Han}+)|(?P<other>[\p{L}--\p{Han}][\p{L}\p{M}'’--\p{Han}]*)", regex.VERSION1)
_LATIN_LETTER = regex.compile(r"\p{Latin}\p{M}*")
_SCRIPTS = {language: regex.compile(rf"[\p{{{script}}}\p{{M}}'’]+") for language, script in LANGUAGES.items()}
_HAN = regex.compile(r"\p{Han}")


def language_share(prompt: Prompt, text: str) -> Score:
    """The share in 0 .. 1 of the words of the thinking that are in `prompt.language`, or else in the question's.

    0 with the reason where the thinking has no words. An unknown `prompt.language` gives a Score with `error` set.
    """
    target = prompt.language or question_language(prompt.question)
    if target not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        return Score(0.0, error=f"{prompt.id}: language: got {target!r}; must be one of {known}")
    counts = count_words(thoughts(text))
    total = sum(counts.values())
    if total == 0:
        return Score(0.0, reason="no words in the thinking")
    share = counts.get(target, 0) / total
    reason = "" if share == 1 else f"{counts.get(target, 0)} of {total} words are {target}"
    return Score(share, reason=reason)


def quick_language(prompt: Prompt, text: str) -> Score | None:
    """The same where it takes a millisecond or so: a short text without Chinese. None otherwise."""
    if len(text) > QUICK_CHARS or _HAN.search(text) or _HAN.search(prompt.question):
        return None
    return language_share(prompt, text)


def prepare_language() -> None:
    """Load jieba's dictionary, a second's work and more, ahead of the first text."""
    _segmenter()


@lru_cache(maxsize=4096)
def question_language(question: str) -> str:
    """The language of most words of a question; among languages with as many words the first in LANGUAGES, so `en` for
    a question without words."""
    counts = count_words(question)
    return max(LANGUAGES, key=lambda language: counts.get(language, 0))


def count_words(text: str) -> dict[str, int]:
    """Words of each language of LANGUAGES; `other` counts those of other scripts and of mixed ones."""
    counts: dict[str, int] = {}
    for run in _RUN.finditer(_NO_PROSE.sub(" ", text)):
        word = run.group()
        if run["han"]:
            language, number = "zh", len(_segmenter().lcut(word))
        elif _LATIN_LETTER.fullmatch(word):
            continue
        else:
            language, number = _language_of(word), 1
        counts[language] = counts.get(language, 0) + number
    return counts


def _language_of(word: str) -> str:
    return next((language for language, script in _SCRIPTS.items() if script.fullmatch(word)), "other")


@lru_cache(maxsize=1)
def _segmenter() -> jieba.Tokenizer:
    """jieba with its dictionary loaded; it keeps a cache of it, in a directory that is only ours."""
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "r1mega"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:  # no home that can be written: the cache goes where nobody else writes either, for this process
        folder = Path(tempfile.mkdtemp(prefix="r1mega-jieba-"))
    segmenter.tmp_dir = str(folder)
    segmenter.initialize()
    return segmenter
