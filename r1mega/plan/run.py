"""`r1mega plan`: from a configuration to its answer and exit code."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from r1mega.config.choices import Mtp, PlanFormat
from r1mega.config.faults import Fault
from r1mega.config.schema import Config
from r1mega.parallel.layout import Layout
from r1mega.plan import held as holdings
from r1mega.plan import job as jobs
from r1mega.plan import validity
from r1mega.plan.assess import Assessment, assess
from r1mega.plan.document import as_document
from r1mega.plan.suggest import suggestions

FITS, DOES_NOT_FIT = 0, 1
_SILENT_SECONDS = 2.0


class Progress:
    """Says on standard error what is at hand, once it takes longer than two seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._begin, self._said = what, total, time.monotonic(), 0.0

    def __call__(self, number: int) -> None:
        now = time.monotonic()
        if now - self._begin > _SILENT_SECONDS and now - self._said > 1.0:
            self._said = now
            print(f"r1mega plan: {self._what} {number + 1} of {self._total}", file=sys.stderr, flush=True)


def plan(config: Config, also: Sequence[Fault | str] = ()) -> int:
    """Print what the run would take; 0 where it fits, 1 where it does not. Raises ConfigError where it cannot be, with
    every reason, those that the caller has found among them."""
    found, elements = work_out(config, also)
    hints = [] if found.fits else suggestions(found)
    if config.plan.format is PlanFormat.json:
        print(json.dumps(as_document(found, hints, elements)), flush=True)
    else:
        from r1mega.plan.report import show

        show(found, hints, elements)
    return FITS if found.fits else DOES_NOT_FIT


def work_out(config: Config, also: Sequence[Fault | str] = ()) -> tuple[Assessment, int]:
    """What the run would take, and the elements of its model. Raises ConfigError as `plan`."""
    fields = validity.model_of(config)
    layout = validity.require(config, fields, also)
    freezes = config.model.mtp is Mtp.freeze
    progress = Progress("pipeline stage", layout.pp)
    if jobs.job_of(config).trains:
        with _quiet():
            parts = holdings.from_megatron(fields, layout, freezes_mtp=freezes, on_stage=progress)
    else:  # engines alone: nothing is built, the whole model is what counts
        parts = holdings.table_of(fields).held(Layout(), freezes_mtp=freezes)
    return assess(config, fields, parts), sum(part.distinct for part in parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Megatron says of packages that a plan does not need; some of it goes to standard output."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
