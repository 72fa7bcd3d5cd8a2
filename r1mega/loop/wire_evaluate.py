"""A configuration -> what an evaluation works with. No Megatron model is built: engines hold the weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.benchmark import graders, rows
from r1mega.benchmark.graders import Grading
from r1mega.benchmark.rows import Problem
from r1mega.config import checkpoint_files
from r1mega.config.choices import EngineKind
from r1mega.config.schema import BenchmarkConfig, Config
from r1mega.data.prompts import tokenize_prompts
from r1mega.loop.sampling import SamplingRun
from r1mega.loop.wire import load_tokenizer
from r1mega.loop.wire_publish import patience_of, shelf_of, torch_dtype
from r1mega.parallel import device as devices
from r1mega.parallel import groups as process_groups
from r1mega.reward.pool import RewardPool
from r1mega.types import Engine, Prompt, SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PROBLEMS_FILE, SAMPLES_FILE, REPORT_FILE, WEIGHTS_FOLDER = "benchmark.jsonl", "samples.jsonl", "report.json", "hf"
VERSION = 0  # of the weights that are evaluated
_AT_ONCE = 4096  # sequences that servers are asked for before all of them are waited for
_PLACES, _BYTES = 16, 1 << 16  # of a file of weights that its fingerprint reads


@dataclass
class EvaluationRun(SamplingRun):
    """What the loop has. `pool` is None where nothing is graded."""

    problems: list[Problem]
    pool: RewardPool | None


def world_size(config: Config) -> int:
    """Processes of a loop that only generates: one for each embedded engine, or the one that speaks to the servers."""
    return config.rollout.engines if config.rollout.engine is EngineKind.embedded else 1


def chunk_size(config: Config) -> int:
    """Sequences that are asked for before all of them are waited for."""
    is_embedded = config.rollout.engine is EngineKind.embedded
    return config.rollout.max_batch * world_size(config) if is_embedded else _AT_ONCE


def weights_dir(config: Config) -> Path:
    """Where the Hugging Face checkpoint is: a training checkpoint is converted to the run directory first."""
    path = Path(config.model.hf)
    return Path(config.run.dir) / WEIGHTS_FOLDER if checkpoint_files.is_megatron(path) else path


@contextmanager
def wire_evaluation(config: Config) -> Iterator[EvaluationRun]:
    """The evaluation's objects on this rank; all of them are closed at the end, however it comes."""
    device = devices.prepare(str(config.device.type), int(os.environ.get("LOCAL_RANK", "0")), config.device.threads)
    group = process_groups.meet(timeout_minutes=config.run.timeout_minutes)
    tokenizer = load_tokenizer(config)
    problems = rows.read_problems(Path(config.run.dir) / PROBLEMS_FILE)
    prompts = prompts_of(config, problems, tokenizer)
    reward, grader = config.reward, str(config.benchmark.grader)
    pool = None
    if grader != graders.NONE:
        pool = RewardPool(partial(Grading, grader), reward.workers, reward.timeout_seconds)
    benchmark = config.benchmark
    params = SamplingParams(
        temperature=benchmark.temperature,
        top_p=benchmark.top_p,
        max_tokens=benchmark.max_tokens,
        stop=tuple(benchmark.stop),
    )
    try:
        yield EvaluationRun(
            config=config,
            group=group,
            rank=group.rank(),
            num_engines=world_size(config),
            chunk_size=chunk_size(config),
            prompts=prompts,
            tokenizer=tokenizer,
            engine=engine_of(config, tokenizer, device),
            params=params,
            problems=problems,
            pool=pool,
        )
    finally:
        if pool is not None:
            pool.close()
    process_groups.part()


def problems_of(config: Config) -> list[Problem]:
    """The problems of the benchmark, from its file or from the hub. Raises ValueError where they cannot be had."""
    benchmark = config.benchmark
    if benchmark.data is not None:
        found = rows.read_file(benchmark.data)
    else:
        assert benchmark.hub is not None, "check_benchmark asks for it"
        try:
            found = rows.read_hub(benchmark.hub, benchmark.hub_config, benchmark.split)
        except ValueError as error:
            raise ValueError(
                f"benchmark.data: got nothing; {error}; check the connection and `huggingface-cli login`, or download "
                "the set elsewhere and set benchmark.data=FILE.jsonl"
            ) from error
    grader = graders.grader(str(benchmark.grader))
    problems = rows.problems_of(
        found,
        _columns(benchmark),
        benchmark.prompt,
        asks=grader.asks if grader is not None else "",
        shuffle_seed=config.run.seed if benchmark.shuffle_options else None,
        reads_language=benchmark.readability,
    )
    return problems[: benchmark.limit]


def prompts_of(config: Config, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The problems tokenized. Raises ValueError for a prompt over benchmark.max_prompt_tokens."""
    benchmark = config.benchmark
    prompts = [Prompt(p.id, p.prompt, p.answer, **({"tests": p.tests} if p.tests else {})) for p in problems]
    try:
        return tokenize_prompts(prompts, tokenizer, str(benchmark.template), benchmark.max_prompt_tokens)
    except ValueError as error:
        raise ValueError(f"benchmark.data: {str(error).replace('data.max_', 'benchmark.max_')}") from None


def fingerprint(directory: Path) -> str:
    """A digest of a checkpoint's safetensors files: their names, sizes and bytes at places spread over each.

    Tells one training's checkpoints from each other without reading all of hundreds of gigabytes.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(_PLACES):
                file.seek(place * max(0, size - _BYTES) // (_PLACES - 1))
                digest.update(file.read(_BYTES))
    return digest.hexdigest()[:16]


def _columns(benchmark: BenchmarkConfig) -> rows.Columns:
    return rows.Columns(
        question=benchmark.question_key,
        answer=benchmark.answer_key,
        options=tuple(benchmark.options_keys),
        tests=benchmark.tests_key,
        fixed_options=tuple(benchmark.options),
    )


def engine_of(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Engine:
    """What generates on this rank, with the weights of `weights_dir`."""
    is_embedded = config.rollout.engine is EngineKind.embedded
    return _embedded(config, tokenizer, device) if is_embedded else _servers(config)


def _embedded(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Engine:
    from r1mega.models.hf_io import CheckpointReader
    from r1mega.rollout.embedded import EmbeddedEngine

    path = weights_dir(config)
    engine = EmbeddedEngine(path, tokenizer, torch_dtype(config.precision.params), device, config.rollout.max_batch)
    engine.load(CheckpointReader(path).stream(), VERSION)
    return engine


def _servers(config: Config) -> Engine:
    from r1mega.rollout.sglang import SglangEngines

    place = shelf_of(config)
    found = place.read_addresses()
    servers = SglangEngines(
        found.servers,
        max_in_flight=config.rollout.max_in_flight,
        patience_seconds=patience_of(config),
        router_url=found.router,
    )
    servers.started_from_disk(str(place.path(VERSION)), VERSION)
    return servers
