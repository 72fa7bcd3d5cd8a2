#!/usr/bin/env python
"""Score responses of a JSONL file by one of the rewards, each within a hard limit of time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r1mega.types import Prompt, Score

REWARDS = ("math", "code", "choice", "format", "language")
# Lines handed to the workers ahead of the one printed next, for each worker.
AHEAD = 32
PROGRESS_SECONDS = 2.0
_SECONDS = "seconds"
EPILOG = """Each line of FILE holds `response`, and
  math      `answer`, or a list of answers that are all right
  code      `tests`, a list of {"input": text, "output": text}
            or {"function": name, "arguments": [...], "output": value}
  choice    `options`, 4 to 8 texts, and `answer`, the letter or the text of the right one
  language  `language` (en, zh, ru, ko, ar, el, he, hi), or `question`, whose language is then wanted; else English

Each line of the output holds `score`, `parts`, `reason`, `error` where the reward failed, and `seconds`.
The exit status is 0, or 1 where a reward failed on any line, or 2 where the input or the options are wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, 1 where a reward failed on a line, 2 after a message on stderr."""
    options = build_parser().parse_args(argv)
    try:
        lines = read_lines(options.input, options.reward)
        check_sandbox(options)
        return score_lines(lines, options)
    except ValueError as error:
        print(f"score_samples: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward", required=True, choices=REWARDS, help="which reward")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE.jsonl", help="the responses")
    parser.add_argument("--workers", type=_positive(int), default=1, help="processes that score (default 1)")
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=5.0,
        metavar="SECONDS",
        help="limit of one line (default 5; code has its own)",
    )
    code = parser.add_argument_group("code")
    code.add_argument("--sandbox", choices=("bubblewrap", "unsafe_rlimits"), default="bubblewrap",
                      help="unsafe_rlimits has limits, but hides neither files nor the network")  # fmt: skip
    code.add_argument("--test-seconds", type=_positive(float), default=6.0, help="limit of one test (default 6)")
    code.add_argument("--total-seconds", type=_positive(float), default=60.0, help="limit of all tests (default 60)")
    code.add_argument("--memory-mib", type=_positive(int), default=1024, help="limit of memory (default 1024)")
    return parser


def read_lines(path: Path, reward: str) -> list[tuple[Prompt, str]]:
    """The questions and responses of the file. Raises ValueError naming file and line for the first that is wrong."""
    from r1mega.data.domains import read_facts
    from r1mega.data.jsonl import read_rows
    from r1mega.types import Prompt

    domain = {"math": "math", "code": "code", "choice": "choice"}.get(reward, "general")
    wanted = {"math": ("answer",), "code": ("tests",), "choice": ("answer", "options"), "language": ("language",)}
    lines = []
    for number, row in read_rows(path, ()):
        place = f"{path}:{number}"
        if not isinstance(row.get("response"), str):
            raise ValueError(f"{place}: 'response' must be text, got {str(row.get('response'))[:80]!r}")
        question = row.get("question", "")
        if not isinstance(question, str):
            raise ValueError(f"{place}: 'question' must be text, got {str(question)[:80]!r}")
        named = {key: row[key] for key in wanted.get(reward, ()) if key in row}
        facts = read_facts(place, named | {"domain": domain}, "answer")
        lines.append((Prompt(id=place, question=question, **facts), row["response"]))
    return lines


def check_sandbox(options: argparse.Namespace) -> None:
    """Raises ValueError where programs are to be run and the sandbox does not work."""
    if options.reward != "code":
        return
    from r1mega.reward.sandbox import SandboxError, open_sandbox

    try:
        open_sandbox(options.sandbox)
    except SandboxError as error:
        raise ValueError(
            str(error).replace("reward.sandbox=", "--sandbox ").replace("reward.sandbox", "--sandbox")
        ) from error


class Timed:
    """A reward that says how long it took, as a part. Made in each worker."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from r1mega.reward.code import CodeLimits
        from r1mega.reward.compose import Rule, RuleSettings

        name = options["reward"]
        code = CodeLimits(options["test_seconds"], options["total_seconds"], options["memory_mib"], options["sandbox"])
        self._rule = Rule({name if name in ("format", "language") else "accuracy": 1.0}, RuleSettings(code))
        self.prepare, self.seconds = self._rule.prepare, self._rule.seconds

    def __call__(self, prompt: Prompt, text: str) -> Score:
        began = time.monotonic()
        try:
            score = self._rule(prompt, text)
        except Exception as error:  # kept in the score, as the pool does it
            from r1mega.types import Score

            score = Score(0.0, error=f"{type(error).__name__}: {error}")
        return replace(score, parts=score.parts | {_SECONDS: time.monotonic() - began})


def score_lines(lines: Sequence[tuple[Prompt, str]], options: argparse.Namespace) -> int:
    """Print a score for each line, in their order. Returns the exit status."""
    from r1mega.reward.pool import RewardPool

    progress = Progress(len(lines))
    num_failed = 0
    with RewardPool(partial(Timed, vars(options)), options.workers, options.timeout) as pool:
        # What a line took that was killed.
        limit = max(Timed(vars(options)).seconds(lines[0][0]) or 0.0, options.timeout)
        for score in in_order(pool, lines, AHEAD * options.workers):
            parts = dict(score.parts)
            record = {"score": score.value, "reason": score.reason, _SECONDS: round(parts.pop(_SECONDS, limit), 6)}
            record["parts"] = parts
            if score.error is not None:
                record["error"] = score.error
                num_failed += 1
            print(json.dumps(record, ensure_ascii=False), flush=True)
            progress.advance(score)
    progress.finish(num_failed)
    return 1 if num_failed else 0


def in_order(pool: Any, lines: Sequence[tuple[Prompt, str]], ahead: int) -> Iterator[Score]:
    """The scores of the lines, so many of them under way at a time."""
    waiting: deque[Future[Score]] = deque()
    for prompt, text in lines:
        waiting.append(pool.submit(prompt, text))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Progress:
    """How far it is, on stderr, every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._sum = total, 0, 0.0
        self._began = self._shown = time.monotonic()

    def advance(self, score: Score) -> None:
        """One line more is done."""
        self._done += 1
        self._sum += score.value
        now = time.monotonic()
        if now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            print(f"{self._done} of {self._total} lines, mean {self._sum / self._done:.3f}", file=sys.stderr)

    def finish(self, num_failed: int) -> None:
        """All of it in one line."""
        seconds = time.monotonic() - self._began
        print(
            f"{self._done} lines in {seconds:.1f} s, mean score {self._sum / max(self._done, 1):.4f}, "
            f"{num_failed} failed",
            file=sys.stderr,
        )


def _positive(kind: type):
    def read(text: str):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


if __name__ == "__main__":
    sys.exit(main())
