"""samples.jsonl: every graded response of an evaluation or a rejection sampling, appended as it comes, in any order.

A process that is killed leaves whole lines and at most one that breaks off, which is cut away when the run goes on. A
sample is known by its problem's place and its own number; the first line of each counts, or the first without a fault
of who graded it.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from r1mega.types import is_right


@dataclass(frozen=True)
class Graded:
    """One response: `problem` counts from 0, and so does `sample`. `tokens` is its length, the end token included."""

    problem: int
    sample: int
    id: str
    score: float
    answer: str | None
    tokens: int
    cut_off: bool
    reason: str = ""
    error: str | None = None
    text: str = ""

    @property
    def right(self) -> bool:
        """Whether the response counts as right where only right and wrong are told apart."""
        return self.score >= 1.0


@dataclass(frozen=True)
class Scored(Graded):
    """A response with what each reward says of it, by name; `score` is their weighted sum."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """See r1mega.types.is_right; not where nothing has judged it."""
        return bool(is_right(self.parts))


class SampleFile:
    """The file of one run, read at the start and appended to from then on. Its rows are of one `kind`."""

    def __init__(self, path: Path, kind: type[Graded] = Graded) -> None:
        """Raises ValueError naming a line that is no sample, but for one that breaks off at the end."""
        self.path, self._kind = path, kind
        self.samples: dict[tuple[int, int], Graded] = {}
        self._lock = threading.Lock()  # samples come from whoever generates and whoever grades
        self._read()
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            try:
                sample = self._kind(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not a sample of such a run ({error}); remove the line, and its sample "
                    "is generated again"
                ) from error
            if self._counts(sample):
                self.samples[sample.problem, sample.sample] = sample
        if end < len(whole):
            os.truncate(self.path, end)

    def add(self, sample: Graded) -> None:
        """Write a sample, at once and as one piece; one that is there already is left as it is, but for one that could
        not be graded."""
        with self._lock:
            if not self._counts(sample):
                return
            self.samples[sample.problem, sample.sample] = sample
            self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
            self._file.flush()

    def _counts(self, sample: Graded) -> bool:
        before = self.samples.get((sample.problem, sample.sample))
        return before is None or (before.error is not None and sample.error is None)

    def ordered(self) -> list[Graded]:
        """All samples, by problem and number."""
        return [self.samples[key] for key in sorted(self.samples)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
