"""How readable a response is, beside whether it is right: its format, its summary, the language it is thought in.

DeepSeek-R1 names poor readability and mixed languages as what R1-Zero lacks (arXiv 2501.12948, section 2.2.4), and
defines a readable pattern, reasoning followed by a summary (section 2.3.1), but publishes no measure. These are ours.
"""

from __future__ import annotations

from r1mega.benchmark.rows import Problem
from r1mega.reward.answer import final_part
from r1mega.reward.format import r1_zero_format
from r1mega.reward.language import count_words, language_share, question_language
from r1mega.types import Prompt


def measures(problem: Problem, text: str) -> dict[str, float]:
    """Each in 0 .. 1, by name.

    `well_formed`: the format reward, thinking and answer between their tags. `readable`: well formed, some words in the
    thinking, and an answer that is a summary: it has words, all of the problem's language (or else the question's).
    `language`: the language reward, the share of the thinking's words that are of that language; 0 without words.
    """
    language = problem.language or question_language(problem.prompt)
    prompt = Prompt(problem.id, problem.prompt, problem.answer, language=language)
    share = language_share(prompt, text)
    well_formed = r1_zero_format(prompt, text).value
    said = count_words(final_part(text))
    is_summary = bool(said) and set(said) == {language}
    has_thought = share.reason != "no words in the thinking"
    return {
        "well_formed": well_formed,
        "readable": float(well_formed == 1.0 and is_summary and has_thought),
        "language": share.value,
    }
