"""Rejection sampling: N samples of each question, scored as they end, then those that are right and readable.

DeepSeek-R1's third stage, and its collection of cold-start data, which differ in what is asked and how (arXiv
2501.12948, sections 2.3.1 and 2.3.3). Every sample is kept in samples.jsonl; what is curated is a function of these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from r1mega.benchmark.samples import Graded, SampleFile, Scored
from r1mega.config.schema import Config
from r1mega.curation.curate import Kept, Outcome, curate
from r1mega.curation.filters import Candidate
from r1mega.curation.patterns import in_pattern
from r1mega.curation.questions import CONTAMINATED, TRIVIAL, Question, row_of
from r1mega.loop.sampling import Job, graded, sample_all
from r1mega.loop.sampling_progress import Progress
from r1mega.loop.wire_evaluate import fingerprint, weights_dir
from r1mega.loop.wire_reject import (
    CURATED_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    RejectionRun,
    benchmarks_of,
    settings_of,
    wire_rejection,
)
from r1mega.types import Completion, FinishReason, Score


def main(config: Config) -> None:
    """Run one rank of the rejection sampling that `config` describes, to its curated rows.

    Raises ValueError where too many rewards failed, or nothing is left.
    """
    with wire_rejection(config) as run:
        path = Path(config.run.dir) / SAMPLES_FILE
        with SampleFile(path, Scored) if run.rank == 0 else nullcontext() as file:
            generate(run, file)
            if file is not None:
                finish(run, file)


def generate(run: RejectionRun, file: SampleFile | None) -> None:
    """Ask for what the file, which rank 0 has, lacks, and score again what could not be scored. Collective."""
    wanted = range(run.config.curate.samples)
    jobs = [(i, j) for i, one in enumerate(run.questions) if not one.left_out for j in wanted]
    progress = None
    if file is not None:
        again = [sample for sample in file.ordered() if sample.error is not None]
        for sample in [_scored(run, sample) for sample in again]:
            file.add(sample.result())
        name = f"{run.config.curate.name}, right"
        is_on = run.config.logger.console
        progress = Progress(name, len(jobs), file, is_on=is_on, share=lambda sample: float(sample.right))
    sample_all(run, jobs, partial(grade, run), file, progress)


def grade(run: RejectionRun, job: Job, completion: Completion) -> Future[Graded]:
    """The sample with its scores, to come."""
    i, j = job
    curate = run.config.curate
    text, ended = cut(curate.opening + run.text_of(completion.token_ids), curate.cut_at)
    sample = Scored(
        problem=i,
        sample=j,
        id=run.questions[i].prompt.id,
        score=0.0,
        answer=None,
        tokens=len(completion.token_ids),
        cut_off=completion.finish_reason is FinishReason.length and not ended,
        text=text,
    )
    return _scored(run, sample)


def cut(text: str, marks: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of the marks, and whether one stands in it."""
    ends = [text.index(mark) for mark in marks if mark in text]
    return (text[: min(ends)], True) if ends else (text, False)


def _scored(run: RejectionRun, sample: Graded) -> Future[Graded]:
    def with_score(score: Score) -> Graded:
        found = {"score": score.value, "parts": score.parts, "reason": score.reason, "error": score.error}
        return Scored(**vars(sample) | found)

    return graded(run.scorer(run.prompts[sample.problem], sample.text), with_score)


def finish(run: RejectionRun, file: SampleFile) -> None:
    """Curate the samples and write the rows, then the report."""
    config, directory = run.config, Path(run.config.run.dir)
    asked = {i for i, one in enumerate(run.questions) if not one.left_out}
    samples = [s for s in file.ordered() if s.problem in asked and s.sample < config.curate.samples]
    _require_scores(samples, config.reward.max_failed_share)
    outcome = curate(_candidates(run, samples), settings_of(config), benchmarks_of(config))
    sampler = {"model": config.model.hf, "weights": fingerprint(weights_dir(config))}
    places = {one.prompt.id: one for one in run.questions}
    rows = [_row(config, kept, places[kept.candidate.prompt_id], sampler) for kept in outcome.kept]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(directory / CURATED_FILE, text)
    found = report(config, run.questions, samples, outcome) | {
        "sampler": sampler,
        "curated": {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()},
    }
    _write(directory / REPORT_FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if config.logger.console:
        _show(found)
    if not rows:
        raise ValueError(
            f"{directory / CURATED_FILE}: no sample of {len(samples)} is kept ({_listed(found['dropped'])}); ask for "
            "more (curate.samples), loosen curate.*, and go on with run.resume=true: the samples are not drawn again"
        )


def _candidates(run: RejectionRun, samples: Sequence[Graded]) -> list[Candidate]:
    """What is curated, by question: its samples, or the response that its row came with."""
    by_question: dict[int, list[Graded]] = {}
    for sample in samples:
        by_question.setdefault(sample.problem, []).append(sample)
    found = []
    for i, question in enumerate(run.questions):
        prompt = question.prompt
        language = prompt.language or run.config.reward.language_target
        same = {"prompt_id": prompt.id, "prompt": prompt.question, "domain": prompt.domain, "language": language}
        if question.left_out == TRIVIAL:
            found.append(Candidate(sample=0, response=question.given, given=True, **same))
        for one in by_question.get(i, ()):
            assert isinstance(one, Scored)
            found.append(
                Candidate(
                    sample=one.sample,
                    response=one.text,
                    tokens=one.tokens,
                    parts=one.parts,
                    error=one.error,
                    cut_off=one.cut_off,
                    **same,
                )
            )
    return found


def _row(config: Config, kept: Kept, question: Question, sampler: dict[str, str]) -> dict[str, Any]:
    """The row to learn from, with where it comes from. Supervised fine-tuning reads the first two."""
    one, tokens = kept.candidate, list(config.curate.special_tokens)
    response = in_pattern(one.response, tokens) if tokens and not one.given else one.response
    source: dict[str, Any] = {"way": config.curate.name, "prompt_id": one.prompt_id}
    if one.given:
        source["given"] = True
    else:
        source |= {"sample": one.sample, "sampler": sampler, "reward": dict(one.parts)}
    name = f"{one.prompt_id}#{'given' if one.given else one.sample}"
    return {
        "prompt": one.prompt,
        "response": response,
        "id": name,
        **row_of(question.prompt),
        "provenance": source | {"filters": list(kept.passed)},
    }


def report(
    config: Config, questions: Sequence[Question], samples: Sequence[Graded], outcome: Outcome
) -> dict[str, Any]:
    """Counts of all that was asked, dropped and kept, in all and by domain. Every sample is counted once."""
    left_out = Counter(one.left_out for one in questions)
    given = sum(kept.candidate.given for kept in outcome.kept)
    kept_samples = len(outcome.kept) - given
    domains = {}
    for domain in sorted({one.prompt.domain for one in questions}):
        own = [s for s in samples if questions[s.problem].prompt.domain == domain]
        kept = [one for one in outcome.kept if one.candidate.domain == domain]
        dropped = Counter(reason for one, reason in outcome.dropped if one.domain == domain)
        domains[domain] = {
            "questions": sum(one.prompt.domain == domain for one in questions),
            "questions_kept": len({one.candidate.prompt_id for one in kept}),
            "samples": len(own),
            "right": sum(sample.right for sample in own),
            "kept": len(kept),
            "dropped": dict(sorted(dropped.items())),
        }
    return {
        "name": config.curate.name,
        "questions": {
            "read": len(questions),
            "asked": left_out[""],
            "contaminated": left_out[CONTAMINATED],
            "trivial": left_out[TRIVIAL],
        },
        "samples": len(samples),
        "given": given,
        "kept": len(outcome.kept),
        "acceptance_rate": round(kept_samples / max(1, len(samples)), 6),
        "dropped": outcome.counts(),
        "domains": domains,
    }


def _require_scores(samples: Sequence[Graded], most: float) -> None:
    """Raises ValueError where the rewards of too many samples failed."""
    failed = [sample for sample in samples if sample.error is not None]
    if len(failed) > most * len(samples):
        raise ValueError(
            f"reward.max_failed_share: the rewards of {len(failed)} of {len(samples)} samples failed, at most {most:g} "
            f"of them may; the first: {failed[0].id}: {failed[0].error}; mend it and go on with run.resume=true: they "
            "are scored again, not drawn again"
        )


def _write(path: Path, text: str) -> None:
    """All of it or nothing: who finds the file finds it whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _show(found: dict[str, Any]) -> None:
    """The counts, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found['name']}: {found['kept']} rows kept of {found['samples']} samples")
    for name in ("domain", "questions", "samples", "right", "kept"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    table.add_column("dropped")
    for domain, counts in found["domains"].items():
        numbers = [str(counts[name]) for name in ("questions", "samples", "right", "kept")]
        table.add_row(domain, *numbers, _listed(counts["dropped"]))
    Console().print(table)
