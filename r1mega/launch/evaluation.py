"""An evaluation on this machine: check, make the run directory, start the processes that generate."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from r1mega.benchmark import rating, rows
from r1mega.benchmark.rows import Problem
from r1mega.config import checkpoint_files
from r1mega.config.check import check
from r1mega.config.choices import EngineDtype, EngineKind, Loop
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.data.prompts import Prompt
from r1mega.launch import late_checks, resume, rundir
from r1mega.launch.engines import EngineFleet, fleet_of
from r1mega.loop import wire_evaluate
from r1mega.loop.wire_evaluate import PROBLEMS_FILE, VERSION
from r1mega.loop.wire_publish import shelf_of
from r1mega.models import hf_fields

CONTENT_FILE = "content.json"


def prepare(config: Config) -> Path:
    """Check everything, make or reopen the run directory, put the problems and the weights where workers look.

    Returns the path of the configuration. Raises ConfigError with every fault found, before anything is written.
    """
    problems = _required(config)
    resume.prepare(config)
    directory = Path(config.run.dir)
    weights = None
    if not checkpoint_files.is_megatron(Path(config.model.hf)):
        weights = wire_evaluate.fingerprint(Path(config.model.hf))
    content = {"problems": rows.digest(problems), "weights": weights}
    if (directory / CONTENT_FILE).exists():
        named = {"problems": ("benchmark.data", str(config.benchmark.data)), "weights": ("model.hf", config.model.hf)}
        require_same(json.loads((directory / CONTENT_FILE).read_text("utf-8")), content, named, config.run.dir)
    config_path = rundir.create(config)
    rows.write_problems(directory / PROBLEMS_FILE, problems)
    (directory / CONTENT_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
    if weights is None:
        convert_weights(config)
    return config_path


def fleet(config: Config, log_dir: Path) -> EngineFleet | None:
    """The servers, where there are any, which load the checkpoint as they start."""
    if config.rollout.engine is not EngineKind.sglang:
        return None
    servers = fleet_of(config, log_dir)
    place, source = shelf_of(config), wire_evaluate.weights_dir(config).absolute()
    target = place.path(VERSION)
    shutil.copytree(place.model, target)
    for path in (*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")):
        os.symlink(path.resolve(), target / path.name)
    place.set_newest(VERSION)
    return servers


def _required(config: Config) -> list[Problem]:
    """The problems of a configuration without a fault. Raises ConfigError."""
    faults: list[Fault | str] = list(check(config))
    if config.stage.loop is not Loop.evaluate:
        constraint = "r1mega evaluate has a stage of its own"
        faults.append(Fault("stage.loop", str(config.stage.loop), constraint, "leave stage= out"))
    if config.model.hf and Path(config.model.hf).is_dir():
        faults += _model_faults(config)
    if faults:
        raise ConfigError(faults)
    try:
        problems = wire_evaluate.problems_of(config)
        faults = [*_prompt_faults(config, problems), *_contest_faults(config, problems)]
        faults += late_checks.check_sglang(config)
        faults += late_checks.check_sandbox(any(problem.tests for problem in problems), config)
        if not checkpoint_files.is_megatron(Path(config.model.hf)) and not _is_fp8(config):
            faults += late_checks.check_tensors(config)
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise ConfigError(faults)
    return problems


def _model_faults(config: Config) -> list[Fault | str]:
    try:
        fields = hf_fields.read(config.model.hf, allow_fp8=True)
    except ValueError as error:
        return [f"model.hf: {line}" for line in str(error).splitlines()]
    serves_fp8 = config.rollout.engine is EngineKind.sglang and config.sglang.dtype is EngineDtype.fp8
    if fields.is_fp8 and not serves_fp8:
        constraint = "its FP8 blocks are served by SGLang alone"
        remedy = "use rollout=sglang sglang.dtype=fp8, or convert it to bf16 (tools/convert_checkpoint.py hf-to-hf)"
        return [Fault("model.hf", config.model.hf, constraint, remedy)]
    positions = fields["max_position_embeddings"]
    if config.benchmark.max_tokens > positions:
        constraint = f"must be at most max_position_embeddings={positions}"
        got = str(config.benchmark.max_tokens)
        return [Fault("benchmark.max_tokens", got, constraint, "lower it or use a model for longer texts")]
    return []


def _is_fp8(config: Config) -> bool:
    return hf_fields.read(config.model.hf, allow_fp8=True).is_fp8


def _prompt_faults(config: Config, problems: Sequence[Problem]) -> list[str]:
    """Every prompt fits its limit, and the model's positions with the longest response behind it."""
    from r1mega.loop.wire import load_tokenizer

    fields = hf_fields.read(config.model.hf, allow_fp8=True)
    prompts: list[Prompt] = wire_evaluate.prompts_of(config, problems, load_tokenizer(config))
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    faults = []
    largest = max(max(prompt.token_ids) for prompt in prompts)
    if largest >= fields["vocab_size"]:
        faults.append(
            f"model.tokenizer: it gives token id {largest}; the model's vocab_size is {fields['vocab_size']}; "
            "use the tokenizer that belongs to the model"
        )
    total, positions = len(longest.token_ids) + config.benchmark.max_tokens, fields["max_position_embeddings"]
    if total > positions:
        faults.append(
            f"benchmark.max_tokens: got {config.benchmark.max_tokens}; {longest.id} has {len(longest.token_ids)} "
            f"prompt tokens, together {total}; the model's max_position_embeddings is {positions}; lower it, or use a "
            "model for longer texts"
        )
    return faults


def _contest_faults(config: Config, problems: Sequence[Problem]) -> list[str]:
    """Every problem is one of a contest whose standings are there, where a rating is asked for."""
    path = config.benchmark.standings
    if path is None:
        return []
    contests = rating.read_standings(path)
    return [
        f"benchmark.standings: got {path}; it lacks contest {problem.contest!r} with problem {problem.index!r}, which "
        f"{problem.id} is; add it or take the problem out"
        for problem in problems
        if problem.contest not in contests or problem.index not in contests[problem.contest].worth
    ]


def require_same(before: dict, now: dict, named: dict[str, tuple[str, str]], run_dir: str) -> None:
    """Raises ConfigError where what kept samples are of is something else now; `named` has the field of each and its
    value."""
    remedy = "restore what was there, or take a new run.dir"
    faults = [
        Fault(*named[name], f"the samples kept in {run_dir} are of other {name}", remedy)
        for name in named
        if before[name] != now[name]
    ]
    if faults:
        raise ConfigError(faults)


def convert_weights(config: Config) -> None:
    """Make a Hugging Face checkpoint of a training checkpoint, in the run directory."""
    target = wire_evaluate.weights_dir(config)
    if target.exists():
        return
    from r1mega.conversion.run import Request, convert

    tokenizer = Path(config.model.tokenizer) if config.model.tokenizer else None
    request = Request(
        source=Path(config.model.hf), source_kind="megatron", out=target, to="hf", workers=1, tokenizer=tokenizer
    )
    try:
        convert(request)
    except ValueError as error:
        raise ConfigError([f"model.hf: {error}"]) from error
