"""Samples of prompts, drawn, graded and kept as they come: what evaluation and rejection sampling have in common.

Samples are drawn by seeds of their own, (place of the prompt, number of the sample), and kept in a file; what is there
is not asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1mega.benchmark.samples import Graded, SampleFile
from r1mega.config.choices import EngineKind
from r1mega.config.schema import Config
from r1mega.loop.sampling_progress import Progress
from r1mega.parallel.collectives import gather, share
from r1mega.parallel.seed import derive
from r1mega.types import Completion, Engine, Prompt, Request, SamplingParams, Score

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedTokenizerBase

Job = tuple[int, int]  # place of the prompt, number of the sample


@dataclass
class SamplingRun:
    """What a loop has that generates and trains nothing, on each of its ranks."""

    config: Config
    group: dist.ProcessGroup
    rank: int
    num_engines: int
    chunk_size: int
    prompts: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    params: SamplingParams

    @property
    def again(self) -> bool:
        """Whether a chunk that was broken off is generated as a whole again: the rounding of the embedded engine
        depends on what else is in the batch."""
        return self.config.rollout.engine is EngineKind.embedded

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that is graded: the response without the end-of-sequence token that closed it."""
        if token_ids and token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)


Grade = Callable[[Job, Completion], Future[Graded]]


def graded(score: Future[Score], sample_of: Callable[[Score], Graded]) -> Future[Graded]:
    """The sample that is to be made of a score to come. Where the score fails, so does the sample: nobody waits."""
    outcome: Future[Graded] = Future()

    def settle(done: Future[Score]) -> None:
        error = done.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(sample_of(done.result()))

    score.add_done_callback(settle)
    return outcome


def sample_all(
    run: SamplingRun, jobs: Sequence[Job], grade: Grade, file: SampleFile | None, progress: Progress | None
) -> None:
    """Ask for those of the jobs that the file, which rank 0 has, lacks. Collective."""
    chunks = [jobs[start : start + run.chunk_size] for start in range(0, len(jobs), run.chunk_size)]
    kept = set(share(list(file.samples) if file is not None else None, run.group))
    for chunk in chunks:
        missing = [job for job in chunk if job not in kept]
        if missing:
            _sample_chunk(run, chunk if run.again else missing, grade, file, progress)
    if progress is not None:
        progress.close()


def _sample_chunk(
    run: SamplingRun, chunk: Sequence[Job], grade: Grade, file: SampleFile | None, progress: Progress | None
) -> None:
    """Generate and grade these samples, each rank its share. Collective."""
    mine = chunk[run.rank :: run.num_engines]
    requests = [
        Request(place, run.prompts[i].token_ids, seed=derive(run.config.run.seed, "sample", i, j))
        for place, (i, j) in enumerate(mine)
    ]
    pending: list[Future[Graded]] = []

    def keep(done: Future[Graded]) -> None:
        if file is not None and done.exception() is None:
            file.add(done.result())
            if progress is not None:
                progress.moved()

    def finished(completion: Completion) -> None:
        sample = grade(mine[completion.key], completion)
        pending.append(sample)
        sample.add_done_callback(keep)

    run.engine.generate(requests, run.params, finished)
    for part in gather([future.result() for future in pending], run.group):
        for sample in part if file is not None else ():
            file.add(sample)
