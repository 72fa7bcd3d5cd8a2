"""A benchmark: k samples of each problem, graded as they end, then the report.

Samples are drawn by seeds of their own, (problem, number of the sample), and kept in samples.jsonl as they come; what
is there is not asked for again. The report is a function of the samples alone.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path

from r1mega.benchmark import graders, rating, report, show
from r1mega.benchmark.estimates import cluster
from r1mega.benchmark.graders import Sameness
from r1mega.benchmark.readability import measures
from r1mega.benchmark.samples import Graded, SampleFile
from r1mega.config.schema import Config
from r1mega.loop.sampling import Job, graded, sample_all
from r1mega.loop.sampling_progress import Progress
from r1mega.loop.wire_evaluate import (
    REPORT_FILE,
    SAMPLES_FILE,
    EvaluationRun,
    fingerprint,
    weights_dir,
    wire_evaluation,
)
from r1mega.reward.answer import spoken
from r1mega.reward.pool import RewardPool
from r1mega.types import Completion, FinishReason, Prompt, Score


def main(config: Config) -> None:
    """Run one rank of the evaluation that `config` describes, to the report."""
    with wire_evaluation(config) as run:
        if run.rank != 0:
            generate(run, None)
            return
        with SampleFile(Path(config.run.dir) / SAMPLES_FILE) as file:
            generate(run, file)
            finish(run, file)


def generate(run: EvaluationRun, file: SampleFile | None) -> None:
    """Ask for what the file, which rank 0 has, lacks. Collective."""
    benchmark = run.config.benchmark
    jobs = [(i, j) for i in range(len(run.problems)) for j in range(benchmark.samples)]
    progress = None
    if file is not None:
        is_on = run.config.logger.console
        progress = Progress(benchmark.name, len(jobs), file, is_on=is_on, share=lambda sample: sample.score)
    sample_all(run, jobs, partial(grade, run), file, progress)


def grade(run: EvaluationRun, job: Job, completion: Completion) -> Future[Graded]:
    """The sample with its score, to come."""
    i, j = job
    text = run.text_of(completion.token_ids)
    grader = graders.grader(str(run.config.benchmark.grader))
    answer = grader.answer(text) if grader is not None and grader.answer is not None else None

    def with_score(score: Score) -> Graded:
        return Graded(
            problem=i,
            sample=j,
            id=run.problems[i].id,
            score=score.value,
            answer=answer,
            tokens=len(completion.token_ids),
            cut_off=completion.finish_reason is FinishReason.length,
            reason=score.reason,
            error=score.error,
            text=text,
        )

    score: Future[Score] = Future()
    if run.pool is None:
        score.set_result(Score(0.0))
    else:
        score = run.pool.submit(run.prompts[i], text)
    return graded(score, with_score)


def finish(run: EvaluationRun, file: SampleFile) -> None:
    """Write the report, and what goes with it, and show it."""
    from rich.console import Console

    config, benchmark, directory = run.config, run.config.benchmark, Path(run.config.run.dir)
    asked = asked_of(run, file)
    contests = rating.read_standings(benchmark.standings) if benchmark.standings is not None else None
    settings = report.Settings(
        benchmark=benchmark.name,
        model=config.model.hf,
        grader=str(benchmark.grader),
        samples=benchmark.samples,
        pass_at=sorted({*benchmark.pass_at, benchmark.samples}),
        bootstrap=benchmark.bootstrap,
        seed=config.run.seed,
        extra={
            "temperature": benchmark.temperature,
            "top_p": benchmark.top_p,
            "max_tokens": benchmark.max_tokens,
            "template": str(benchmark.template),
            "prompt": benchmark.prompt,
            "engine": str(config.rollout.engine),
            "weights": fingerprint(weights_dir(config)),
        },
    )
    found = report.build(settings, asked, contests, attempts=min(benchmark.attempts, benchmark.samples))
    (directory / REPORT_FILE).write_text(report.to_json(found), encoding="utf-8")
    if benchmark.plot:
        show.plot(found, [sample.tokens for sample in file.ordered()], directory / "benchmark.png")
    if str(benchmark.grader) == graders.NONE:
        write_responses(directory / "responses.jsonl", run, file)
    if config.logger.console:
        show.show(found, Console())


def asked_of(run: EvaluationRun, file: SampleFile) -> list[report.Asked]:
    """The problems with their samples, and which answers are the same."""
    benchmark = run.config.benchmark
    wanted = [s for s in file.ordered() if s.problem < len(run.problems) and s.sample < benchmark.samples]
    grader = graders.grader(str(benchmark.grader))
    found = []
    with RewardPool(Sameness, run.config.reward.workers, run.config.reward.timeout_seconds) as pool:

        def same(first: str, second: str) -> bool:
            if grader.same is not None:
                return grader.same(first, second)
            # math-verify's comparison is not symmetric; whichever of the two is the known one, they are the same.
            return any(
                pool.submit(Prompt(id="", question="", answer=a), b).result().value == 1.0
                for a, b in ((first, second), (second, first))
            )

        for place, samples in groupby(wanted, key=lambda sample: sample.problem):
            own = list(samples)
            has_votes = grader is not None and grader.answer is not None
            classes = cluster([sample.answer for sample in own], same) if has_votes else None
            problem = run.problems[place]
            figures = [measures(problem, sample.text) for sample in own] if benchmark.readability else []
            found.append(report.Asked(problem, own, classes, figures))
    return found


def write_responses(path: Path, run: EvaluationRun, file: SampleFile) -> None:
    """What graders elsewhere read: prompt and response, the response without its thinking."""
    lines = (
        {"id": s.id, "sample": s.sample, "prompt": run.problems[s.problem].prompt, "response": spoken(s.text).strip()}
        for s in file.ordered()
    )
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
